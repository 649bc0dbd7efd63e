"""From the engine's threads to asyncio: waiting for jobs, following them, and noticing that a client has left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

from idgen.errors import Cancelled
from idgen.jobs import Job, Progress
from idgen.portrait import Portrait

KEEP_ALIVE_S = 15.0
"""Proxies close streams on which nothing comes for a minute or so."""
BUFFERED = 16
"""Steps that a slow reader may lag behind; later ones are left out, for previews take memory."""


async def disconnected(request: Request) -> None:
    """Return when the client has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def finished(job: Job, request: Request) -> list[Portrait]:
    """Wait for a job without blocking the loop; a client that leaves takes its job with it.

    Raises:
        IdgenError: the job's.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def settle() -> None:
        if not done.done():
            done.set_result(None)

    job.add_done_callback(lambda _: loop.call_soon_threadsafe(settle))
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done:
            raise Cancelled("the client has left.")
        return job.result(0)
    finally:
        gone.cancel()
        job.cancel()


async def followed(job: Job) -> AsyncIterator[Progress | None]:
    """Progress as it comes, ``None`` when nothing came for a while; ends with the job. Closing it cancels the job."""
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Progress | Job] = asyncio.Queue()

    def put(event: Progress | Job) -> None:
        if isinstance(event, Job) or events.qsize() < BUFFERED:
            events.put_nowait(event)

    job.subscribe(lambda event: loop.call_soon_threadsafe(put, event))
    job.add_done_callback(lambda job: loop.call_soon_threadsafe(put, job))
    try:
        while True:
            try:
                event = await asyncio.wait_for(events.get(), KEEP_ALIVE_S)
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(event, Job):
                return
            yield event
    finally:
        job.cancel()


def server_sent(event: str, data: Mapping[str, Any]) -> bytes:
    """One Server-Sent Event (WHATWG HTML, section 9.2)."""
    return f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()


KEEP_ALIVE = b": still working\n\n"


def streamed(job: Job, events: AsyncIterator[bytes]) -> StreamingResponse:
    """The response that sends a job's events; a client that leaves takes its job with it."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # the latter: nginx must not collect them
    # The background task also runs for a client that left before the first event was asked for.
    background = BackgroundTask(job.cancel)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers, background=background)
