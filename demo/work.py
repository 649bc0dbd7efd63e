"""Following the engine's work from a page: progress while it runs, errors as toasts, Cancel at any time."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from idgen.demo import panels
from idgen.errors import Cancelled, IdgenError

if TYPE_CHECKING:
    from idgen.demo.limits import LimitedEngine
    from idgen.demo.session import Session
    from idgen.portrait import Portrait
    from idgen.request import Request

log = logging.getLogger("idgen.demo")

PAUSE = 0.12
"""Seconds between two updates of the page: faster ones nobody sees, and each goes over the network."""


@contextmanager
def toasts() -> Iterator[None]:
    """Turn errors into toasts that name the cure."""
    try:
        yield
    except IdgenError as error:
        # Gradio renders toasts as HTML, and messages may hold a user's own words.
        raise gr.Error(escape(str(error)), duration=15, print_exception=False) from error
    except gr.Error:
        raise
    except Exception as error:
        log.exception("the demo failed")
        words = f"Something unexpected went wrong ({type(error).__name__}). Try again; the server's log says more."
        raise gr.Error(words, print_exception=False) from error


@dataclass
class Run:
    """One request being followed. Iterate :meth:`updates`, then read the outcome."""

    session: Session
    engine: LimitedEngine
    request: Request
    label: str
    portraits: list[Portrait] = field(default_factory=list)
    seconds: float = 0.0
    steps: tuple[int, int] = (0, 0)
    stopped: bool = False

    def updates(self) -> Iterator[str]:
        """HTML to show, a few times a second, until the work has ended.

        Raises:
            IdgenError: whatever stopped it, except the user, who is told by ``stopped``.
        """
        self.engine.limits.check(self.request)  # before a model is loaded for what is refused
        name = self.request.pipeline
        if name not in {pipeline.name for pipeline in self.engine.loaded()}:
            yield panels.waiting(f"Loading {name} (only the first time)")
            self.engine.pipeline(name)
        if self.session.cancelled:
            self.stopped = True
            return
        started = time.monotonic()
        job = self.engine.submit(self.request, preview_every=1)
        self.session.watch(job)
        try:
            yield from self._progress(job)
            self.portraits = job.result()
        except Cancelled:
            self.stopped = True
        finally:
            # Also reached when the browser goes away: Gradio then closes this generator.
            job.cancel()
            self.session.unwatch(job)
            self.seconds = time.monotonic() - started

    def _progress(self, job: Any) -> Iterator[str]:
        news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        unsubscribe = job.subscribe(news.put)
        job.add_done_callback(lambda _: news.put(None))
        previews: list[Any] = []
        try:
            while True:
                try:
                    progress = news.get(timeout=0.5)
                except queue.Empty:
                    if not self.steps[0]:
                        yield panels.waiting(_place(job.position))
                    continue
                while progress is not None and not news.empty():  # only the latest is of interest
                    progress = news.get()
                if progress is None:
                    return
                previews = progress.previews or previews
                self.steps = progress.step, progress.total
                yield panels.working(self.label, progress.step, progress.total, progress.eta_s, previews)
                time.sleep(PAUSE)
        finally:
            unsubscribe()

    @property
    def summary(self) -> str:
        """How it ended, as HTML."""
        if self.stopped:
            at = f" after step {self.steps[0]} of {self.steps[1]}" if self.steps[0] else " before it started"
            return panels.finished(f"Stopped{at}.", "stopped")
        count = len(self.portraits)
        return panels.finished(f"{count} portrait{'s' if count != 1 else ''} in {panels.duration(self.seconds)}.")


def _place(position: int) -> str:
    if position > 1:
        return f"Waiting: {position - 1} before you"
    return "Waiting for the current picture to finish" if position else "Reading the photo and the prompt"
