"""``/v1/portraits``: idgen's own API, with progress and previews as Server-Sent Events."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from idgen.jobs import Job
from idgen.portrait import Portrait
from idgen.service import photos
from idgen.service.bridge import KEEP_ALIVE, finished, followed, server_sent, streamed
from idgen.service.errors import ApiError, explain
from idgen.service.openai_api import ERRORS
from idgen.service.pictures import Format, as_base64, encode_portrait
from idgen.service.schemas import PortraitData, PortraitsAnswer, PortraitsOrder
from idgen.service.state import Orderer, Service, ServiceOf

router = APIRouter(prefix="/v1", tags=["Portraits"], responses=ERRORS)

EVENTS = """Server-Sent Events with `stream`: `queued` (id, position), `progress` (step, total, eta_s; with `previews`
also previews, base64 JPEG), `portrait` (as in the answer without `stream`) for each image, and last `done` or `error`.
"""


@router.post(
    "/portraits",
    response_model=PortraitsAnswer,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string", "description": EVENTS}}}}},
)
async def portraits(order: PortraitsOrder, request: Request, service: ServiceOf, owner: Orderer) -> Response:
    """Make portraits of one person, given by photos or by an enrolled identity."""
    fields = await _fields(order, service, owner)
    made = await photos.decoding(lambda: service.order(fields))
    stream = order.stream or "text/event-stream" in request.headers.get("accept", "")
    job = service.submit(made, order.deadline, order.previews if stream else 0)
    if stream:
        return streamed(job, _events(job, order.output_format))
    started = time.monotonic()
    made_portraits = await finished(job, request)
    answer = PortraitsAnswer(
        id=job.id,
        pipeline=made_portraits[0].provenance["request"]["pipeline"],
        seconds=round(time.monotonic() - started, 3),
        output_format=order.output_format,
        portraits=[await _datum(portrait, order.output_format) for portrait in made_portraits],
    )
    return JSONResponse(answer.model_dump())


async def _fields(order: PortraitsOrder, service: Service, owner: str) -> dict[str, Any]:
    if order.photos and order.identity:
        raise ApiError(400, "give photos or identity, not both.", "invalid_field", "identity")
    people: Any = await photos.from_texts(order.photos, service.settings, "photos") or None
    if order.identity is not None:
        people = service.shelf.get(owner, order.identity)
    pictures = {
        name: await photos.from_text(text, service.settings, name)
        for name in ("pose", "image", "mask")
        if (text := getattr(order, name)) is not None
    }
    name = order.pipeline if order.pipeline != "auto" or people is not None else None
    pipeline = service.resolve(name, people is not None, "pipeline")
    sizes = {name: getattr(order, name) for name in ("prompt", "n", "width", "height")}
    return {**order.look(), **sizes, **pictures, "who": people, "pipeline": pipeline}


async def _datum(portrait: Portrait, kind: Format) -> PortraitData:
    return PortraitData(
        image=base64.b64encode(await encode_portrait(portrait, kind)).decode(),
        seed=portrait.seed,
        likeness=portrait.likeness,
        likeness_note=portrait.likeness_note,
        provenance=portrait.provenance,
    )


async def _events(job: Job, kind: Format) -> AsyncIterator[bytes]:
    yield server_sent("queued", {"id": job.id, "position": job.position})
    async for progress in followed(job):
        if progress is None:
            yield KEEP_ALIVE
            continue
        data: dict[str, Any] = {"step": progress.step, "total": progress.total, "eta_s": progress.eta_s}
        if progress.previews:
            data["previews"] = [await as_base64(image, "jpeg", 80) for image in progress.previews]
        yield server_sent("progress", data)
    try:
        made = job.result(0)
    except Exception as error:
        yield server_sent("error", explain(error)[1])
        return
    for portrait in made:
        yield server_sent("portrait", (await _datum(portrait, kind)).model_dump())
    yield server_sent("done", {"id": job.id, "portraits": len(made)})
