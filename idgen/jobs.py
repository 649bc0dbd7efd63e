"""Jobs: what :meth:`idgen.engine.Engine.submit` returns, the numbers and the errors of a queue."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from idgen.errors import Cancelled, IdgenError

if TYPE_CHECKING:
    from idgen.engine import Engine
    from idgen.portrait import Portrait
    from idgen.request import Request
    from idgen.sampler import Step

log = logging.getLogger("idgen.engine")

State = Literal["queued", "running", "done", "failed", "cancelled"]


class Busy(IdgenError):
    """The queue is full. ``retry_after``: whole seconds, at least 1, after which a place is likely to be free."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosed(IdgenError):
    """The engine is shutting down and takes no more requests."""


class DeadlineExceeded(IdgenError):
    """The request was not finished within its deadline; its work was stopped."""


@dataclass(frozen=True, eq=False)
class Progress:
    """How far a job is, sent after each denoising step."""

    step: int
    """steps done, 1 to ``total``"""
    total: int
    previews: list[Any] | None
    """a PIL image for each picture in the making, when this step is one that shows them"""
    eta_s: float
    """estimated seconds until the last step is done"""


@dataclass(frozen=True)
class Stats:
    """What an engine has done since it started."""

    queued: int
    """jobs that wait now"""
    running: int
    """jobs that are denoised or decoded now"""
    served: int
    failed: int
    cancelled: int
    rejected: int
    """refused because the queue was full"""
    images: int
    batch_sizes: dict[int, int]
    """images in one sampler run -> how many such runs"""
    busy_s: float
    """seconds in which the engine's thread worked; where decoding overlaps with it, that is not added"""


class Job:
    """One request on its way through the engine. May be used from any thread."""

    def __init__(self, engine: Engine, request: Request, deadline: float | None, preview_every: int) -> None:
        self.id = uuid.uuid4().hex
        self.request = request
        """as submitted, with the seed decided"""
        self.preview_every = preview_every
        self.submitted = time.monotonic()
        self.expires = None if deadline is None else self.submitted + deadline
        self.state: State = "queued"
        self.error: BaseException | None = None
        self.parts = deque(split(request, engine.max_batch))
        """what is left to run: requests of at most ``max_batch`` images each"""
        self.part_count = len(self.parts)
        self.portraits: list[Portrait] = []
        self.key: Hashable | None = None
        """jobs with equal keys share UNet calls; the engine's thread decides it, once the pipeline is there"""
        self._engine = engine
        self._finished = threading.Event()
        self._subscribers: dict[int, Callable[[Progress], object]] = {}
        self._done_callbacks: list[Callable[[Job], object]] = []
        self._last: Progress | None = None
        self._keys = itertools.count()
        # Not a plain lock: a callback that is let go under it may be the last to hold what unsubscribes as it goes.
        self._lock = threading.RLock()

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def position(self) -> int:
        """Its place in the queue from 1; 0 when it runs or has ended."""
        return self._engine.position(self)

    def result(self, timeout: float | None = None) -> list[Portrait]:
        """Wait for the portraits.

        Args:
            timeout: seconds to wait; ``None`` waits as long as it takes. The job goes on after a timeout.
        Raises:
            IdgenError: whatever stopped the job; :class:`Cancelled` and :class:`DeadlineExceeded` among them.
            TimeoutError: it has not ended within ``timeout``.
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"the job has not ended within {timeout} s.")
        if self.error is not None:
            raise self.error
        return list(self.portraits)

    def cancel(self) -> bool:
        """Give the job up: at once for whoever waits, and within two denoising steps for the models.

        Returns:
            Whether it was still waiting or running.
        """
        return self._engine.finish(self, "cancelled", Cancelled("the request was cancelled."))

    def subscribe(self, callback: Callable[[Progress], object]) -> Callable[[], None]:
        """Call ``callback`` on the engine's thread after each step, and at once with the latest progress, if any.

        Keep it short: the models wait for it. Returns a function that ends the subscription.
        """
        key, seen = next(self._keys), None
        while True:
            with self._lock:  # not while it is called; and nothing that comes meanwhile may come before what is older
                if self._last is seen:
                    self._subscribers[key] = callback
                    break
                seen = self._last
            _call(callback, seen)

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers.pop(key, None)

        return unsubscribe

    def events(self) -> Iterator[Progress]:
        """Progress as it comes, until the job has ended in whatever way (then ask :meth:`result`)."""
        waiting: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        unsubscribe = self.subscribe(waiting.put)
        self.add_done_callback(lambda _: waiting.put(None))
        try:
            while (event := waiting.get()) is not None:
                yield event
        finally:
            unsubscribe()

    def add_done_callback(self, callback: Callable[[Job], object]) -> None:
        """Call ``callback(job)`` once when the job ends, on the thread that ends it; at once if it has ended."""
        with self._lock:
            if not self._finished.is_set():
                self._done_callbacks.append(callback)
                return
        _call(callback, self)

    def publish(self, progress: Progress) -> None:
        """For the engine: tell the subscribers."""
        with self._lock:
            self._last = progress
            callbacks = list(self._subscribers.values())
        for callback in callbacks:
            _call(callback, progress)

    def settle(self) -> None:
        """For the engine, after it has set the state: release whoever waits."""
        with self._lock:
            self._finished.set()
            callbacks, self._done_callbacks = self._done_callbacks, []
            self._subscribers.clear()
        for callback in callbacks:
            _call(callback, self)


def split(request: Request, size: int) -> list[Request]:
    """Requests of at most ``size`` images which together make the same ones: the k-th image has seed + k."""
    if request.n <= size:
        return [request]
    assert request.seed is not None
    return [
        request.change(seed=request.seed + first, n=min(size, request.n - first)) for first in range(0, request.n, size)
    ]


def live(jobs: Sequence[Job]) -> tuple[list[Job], list[Request]]:
    """The jobs that nobody has given up, with what each runs next."""
    pairs = []
    for job in jobs:
        try:
            pairs.append((job, job.parts[0]))
        except IndexError:  # it ended in this moment
            continue
    return [job for job, _ in pairs], [part for _, part in pairs]


def publish(step: Step, jobs: Sequence[Job], sizes: list[int], spent: float) -> None:
    """Tell the jobs of one run how far it is. sizes: images of each in this run; spent: seconds since it began."""
    due = [job.preview_every > 0 and (step.index + 1) % job.preview_every == 0 and not job.done for job in jobs]
    previews = step.preview() if any(due) else []
    row = 0
    for job, size, shown in zip(jobs, sizes, due):
        before = job.part_count - len(job.parts)
        done, total = before * step.total + step.index + 1, job.part_count * step.total
        eta = spent / (step.index + 1) * (total - done)
        if not job.done:
            job.publish(Progress(done, total, previews[row : row + size] if shown else None, round(eta, 3)))
        row += size


def _call(callback: Callable[[Any], object], value: Any) -> None:
    try:
        callback(value)
    except KeyboardInterrupt:  # not the callback's: it comes to the main thread wherever that is
        raise
    except BaseException:  # a caller's mistake must not stop the work of others
        log.exception("a callback of a job failed")
