"""The engine: one thread runs the UNet; requests wait in a bounded queue and share UNet calls where they can.

The demo, the HTTP service and the cluster all stand on it. It knows threads only, nothing of asyncio.
"""

from __future__ import annotations

import functools
import logging
import math
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from idgen.batching import key_or_alone
from idgen.errors import BadRequest, Cancelled, IdgenError, OutOfMemory
from idgen.jobs import Busy, DeadlineExceeded, EngineClosed, Job, Progress, State, Stats, live, publish
from idgen.overlap import Finisher, portraits_of
from idgen.residents import Residents

if TYPE_CHECKING:
    from idgen.method import Order
    from idgen.overlap import Denoised
    from idgen.pipeline import Pipeline
    from idgen.request import Request
    from idgen.sampler import Step

__all__ = ["Busy", "DeadlineExceeded", "Engine", "EngineClosed", "Job", "Progress", "Stats"]

log = logging.getLogger("idgen.engine")

_LONGEST_WAIT = 3600.0
"""seconds, after which deadlines are looked at again; a longer one may be more than the system can wait"""


class Engine:
    """Runs requests on resident pipelines. Use as a context manager, or :meth:`close` it."""

    def __init__(
        self,
        load: Callable[[str], Pipeline] | Mapping[str, Any] | None = None,
        *,
        queue_size: int = 64,
        max_batch: int = 8,
        batching: bool = True,
        keep_inputs: bool = False,
        keep: Sequence[str] = (),
    ) -> None:
        """Start the engine's thread. No model is loaded before it is needed.

        Args:
            load: gives a pipeline for a name; or settings for :func:`idgen.load` (``base``, ``device`` ...); ``None``
                loads with its defaults.
            queue_size: jobs that may wait, at least 1.
            max_batch: images in one UNet call, at least 1. A request for more is run in several.
            batching: whether waiting requests that fit together share UNet calls.
            keep_inputs: whether photos and identities are kept on this machine, so that ``idgen generate --like`` can
                make a portrait again (see :mod:`idgen.memory`). Off, for the users of a server are other people.
            keep: pipelines that stay in memory once they are loaded. Of others, such as combinations that clients name,
                only the :data:`~idgen.residents.SPARE` most recently used stay.
        Raises:
            BadRequest: a number is out of its bounds.
        """
        for name, value in (("queue_size", queue_size), ("max_batch", max_batch)):
            if value < 1:
                raise BadRequest(f"{name} is {value}; it must be at least 1.", name)
        if load is None or isinstance(load, Mapping):
            from idgen import api

            load = functools.partial(api.load, **{k: v for k, v in (load or {}).items() if v is not None})
        self.queue_size, self.max_batch, self.batching = queue_size, max_batch, batching
        self.keep_inputs = keep_inputs
        self._residents = Residents(load, keep)
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._finishing: list[Job] = []
        self._finisher = Finisher()
        self._closed = False
        self._counts: Counter[str] = Counter()
        self._batch_sizes: Counter[int] = Counter()
        self._busy_s = 0.0
        self._seconds_per_job = 0.0
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._due = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._work, name="idgen-engine", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="idgen-deadlines", daemon=True).start()

    def submit(self, request: Request, *, deadline: float | None = None, preview_every: int = 0) -> Job:
        """Queue a request.

        Args:
            deadline: seconds from now after which the job fails with :class:`DeadlineExceeded`; ``None``: never.
            preview_every: show previews after every so many steps; 0 shows none.
        Raises:
            Busy: the queue is full. EngineClosed: the engine was closed. BadRequest: an argument is out of bounds.
        """
        if deadline is not None and not (deadline > 0 and math.isfinite(deadline)):
            raise BadRequest(f"deadline is {deadline}; it must be above 0 seconds.", "deadline")
        if preview_every < 0:
            raise BadRequest(f"preview_every is {preview_every}; it must be 0 or more.", "preview_every")
        if request.seed is None:  # decided here, so that a job that runs in parts or twice keeps its pictures
            request = request.change(seed=secrets.randbelow(2**32))
        job = Job(self, request, deadline, preview_every)
        with self._lock:
            self.check_room()
            self._queue.append(job)
            self._wake.notify()
            self._due.notify()
        return job

    def check_room(self) -> None:
        """Refuse before the work of preparing a request that could not be queued.

        Raises:
            Busy, EngineClosed: as :meth:`submit` would at this moment.
        """
        with self._lock:
            if self._closed:
                raise EngineClosed("the server is shutting down; send the request again in a minute.")
            if len(self._queue) >= self.queue_size:
                self._counts["rejected"] += 1
                wait = max(1, min(3600, math.ceil(self._seconds_per_job * len(self._queue))))
                raise Busy(f"{len(self._queue)} requests are waiting, as many as may; try again in {wait} s.", wait)

    def pipeline(self, name: str = "auto") -> Pipeline:
        """The resident pipeline of that name, loaded where it is not there. May be called from any thread.

        Raises:
            IdgenError: as :func:`idgen.load`.
        """
        return self._residents.get(name)

    def loaded(self) -> list[Pipeline]:
        """The pipelines that are resident now."""
        return self._residents.all()

    def stats(self) -> Stats:
        """The numbers of this moment."""
        with self._lock:
            served, failed, cancelled, rejected, images = (
                self._counts[name] for name in ("done", "failed", "cancelled", "rejected", "images")
            )
            running = len({job.id for job in [*self._running, *self._finishing] if not job.done})
            sizes = dict(self._batch_sizes)
            return Stats(
                len(self._queue), running, served, failed, cancelled, rejected, images, sizes, round(self._busy_s, 3)
            )

    def position(self, job: Job) -> int:
        """A job's place in the queue from 1; 0 when it runs or has ended."""
        with self._lock:
            return self._queue.index(job) + 1 if job in self._queue and job.state == "queued" else 0

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests and end the thread.

        Args:
            drain: finish what runs and waits; otherwise it is cancelled.
            timeout: seconds after which what is left is cancelled; ``None`` waits as long as it takes.
        """
        # A callback of a job may close the engine, on a thread that would then wait for itself.
        outside = threading.current_thread() is not self._thread and not self._finisher.is_here
        with self._lock:
            self._closed = True
            self._wake.notify_all()
        if drain and outside:
            self._thread.join(timeout)
        for job in self._all():
            self.finish(job, "cancelled", EngineClosed("the server shut down before the request was finished."))
        if outside:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def finish(self, job: Job, state: State, error: BaseException | None = None) -> bool:
        """End a job once, in one of the final states, and free its place. For :class:`Job` and the engine itself."""
        with self._lock:
            if job.done:
                return False
            if job in self._queue:
                self._queue.remove(job)
            job.error, job.state = error, state
            job.parts.clear()
            self._counts[state] += 1
        job.settle()
        return True

    def _all(self) -> list[Job]:
        with self._lock:
            return [*self._running, *self._finishing, *self._queue]

    def _watch(self) -> None:
        """End jobs at their deadlines, whatever the engine's thread is busy with: loading a model takes minutes."""
        while self._wait_for_deadline():
            self._expire()

    def _wait_for_deadline(self) -> bool:
        """Wait until a job may be late. ``False``: the engine has ended."""
        with self._lock:
            ends = [job.expires for job in self._all() if not job.done]
            if self._closed and not ends:
                return False
            due = min((end for end in ends if end is not None), default=math.inf) - time.monotonic()
            if due > 0:
                self._due.wait(min(due, _LONGEST_WAIT))
            return True

    def _expire(self) -> None:
        now = time.monotonic()
        for job in self._all():
            if job.expires is not None and now >= job.expires and not job.done:
                waited = job.expires - job.submitted
                self.finish(job, "failed", DeadlineExceeded(f"the request was not finished within {waited:g} s."))

    def _work(self) -> None:
        while (first := self._next()) is not None:
            started = time.monotonic()
            try:
                self._run(self._with_mates(first))
            except BaseException as error:  # the thread must outlive every mistake
                for job in self._running:
                    self._fail(job, error)
            finally:
                seconds = time.monotonic() - started
                with self._lock:
                    jobs, self._running = self._running, []
                    self._busy_s += seconds
                    each = seconds / len(jobs)
                    self._seconds_per_job = 0.7 * (self._seconds_per_job or each) + 0.3 * each
                    # Behind the others: a request for many images does not keep requests for one waiting.
                    self._queue.extend(job for job in jobs if job.parts)
                first, jobs = None, []  # do not keep their pictures alive while waiting
        self._finisher.close()
        with self._lock:
            self._due.notify()  # the last to go

    def _next(self) -> Job | None:
        """Wait for work: the first job in the queue."""
        with self._lock:
            while True:
                if self._queue:
                    first = self._queue.popleft()
                    first.state, self._running = "running", [first]
                    return first
                if self._closed:
                    return None
                self._wake.wait()

    def _with_mates(self, first: Job) -> list[Job]:
        """A job, and all that wait and fit into one UNet call with it."""
        if not self.batching:
            return [first]
        with self._lock:
            waiting = [first, *self._queue]
        # Here, not in submit: a tokenizer serves one thread only. Without the lock: a long prompt takes its time.
        for job in waiting:
            known = self._residents.known(job.request.pipeline)
            if job.key is None and known is not None:
                job.key = key_or_alone(known, job.request, job.id)
        with self._lock:
            images = first.parts[0].n if first.parts and first.key is not None else self.max_batch
            for job in list(self._queue):
                if images + job.parts[0].n <= self.max_batch and job.key == first.key:
                    self._queue.remove(job)
                    job.state = "running"
                    self._running.append(job)
                    images += job.parts[0].n
            return list(self._running)

    def _run(self, jobs: list[Job]) -> None:
        try:
            pipeline = self.pipeline(jobs[0].request.pipeline)
        except Exception as error:
            for job in jobs:
                self._fail(job, error)
            return
        jobs, parts = live(jobs)
        orders: dict[str, Order] = {}
        for job, part in zip(jobs, parts):
            # A request's own faults, such as a photo without a face, before it joins others.
            try:
                orders[job.id] = pipeline.order(part)
            except Exception as error:
                self._fail(job, error)
        jobs = [job for job in jobs if job.id in orders]
        try:
            self._sample(pipeline, jobs, orders)
            return
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
        # One of them does not fit after all, or together they are too large: each gets its own answer. Not inside the
        # except clause: there the error still holds the failed call's tensors.
        for job in jobs:
            try:
                self._sample(pipeline, [job], orders)
            except Exception as own:
                self._fail(job, own)

    def _sample(self, pipeline: Pipeline, jobs: Sequence[Job], orders: Mapping[str, Order]) -> None:
        """One run for jobs with what it is to make of them, by their ids."""
        jobs, parts = live(jobs)
        if not jobs:
            return
        started = time.monotonic()

        def after_step(step: Step) -> bool:
            if all(job.done for job in jobs):
                return False
            spent = time.monotonic() - started
            publish(step, jobs, [part.n for part in parts], spent)
            return True

        denoise = functools.partial(pipeline.denoise, [orders[job.id] for job in jobs], callback=after_step)
        denoised = None
        try:
            denoised = denoise()
        except Cancelled:
            return
        except OutOfMemory:
            if not self._finisher.wait():
                raise
        if denoised is None:  # beside a decoding it did not fit; alone, and without the error's tensors, it may
            denoised = denoise()
        with self._lock:
            self._batch_sizes[sum(part.n for part in parts)] += 1
            for job in jobs:
                if not job.done:
                    job.parts.popleft()
            self._finishing.extend(jobs)
        deliver = functools.partial(self._deliver, pipeline, jobs, denoised)
        if pipeline.backbone.overlap:
            self._finisher.submit(deliver)
        else:
            deliver()

    def _deliver(self, pipeline: Pipeline, jobs: Sequence[Job], denoised: Denoised) -> None:
        """Hand each job its portraits, or the error that they ended in. Never raises."""
        try:
            if all(job.done for job in jobs):
                return
            for job, made in zip(jobs, portraits_of(pipeline, denoised, self.keep_inputs)):
                if isinstance(made, Exception):
                    self._fail(job, made)
                    continue
                with self._lock:
                    if job.done:
                        continue
                    job.portraits.extend(made)
                    self._counts["images"] += len(made)
                    complete = len(job.portraits) == job.request.n
                if complete:
                    self.finish(job, "done")
        except BaseException as error:
            for job in jobs:
                self._fail(job, error)
        finally:
            with self._lock:
                for job in jobs:
                    self._finishing.remove(job)

    def _fail(self, job: Job, error: BaseException) -> None:
        if not isinstance(error, IdgenError):
            log.error("a request failed unexpectedly", exc_info=error)
        # The frames of the traceback hold the models' tensors, for as long as somebody holds the job.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        if not isinstance(error, Exception):
            # A panic of a native library, or an exit that a library asked for: it must not end whoever waits here.
            error = RuntimeError(f"{type(error).__name__}: {error}")
        self.finish(job, "failed", error)
