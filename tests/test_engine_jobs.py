"""A job's life in the engine: progress and previews, cancelling, deadlines, and an engine that closes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from idgen.engine import DeadlineExceeded, Engine, EngineClosed, Progress
from idgen.errors import Cancelled
from idgen.method import Order
from tests import tiny
from tests.engines import PIPELINE, Gate, alone, assert_same_pictures, order, wait_until

pytestmark = pytest.mark.usefixtures("engine_overlap")


def test_progress_comes_after_every_step_with_previews_when_asked() -> None:
    with Engine(lambda name: tiny.shared(PIPELINE)) as engine:
        job = engine.submit(order(0, n=2, steps=4), preview_every=2)
        events = list(job.events())
        job.result(0)
    assert events[-1].step == events[-1].total == 4
    assert [e.step for e in events] == sorted({e.step for e in events})
    shown = {e.step: e.previews for e in events if e.previews}
    assert set(shown) <= {2, 4} and 4 in shown
    assert [image.size for image in shown[4]] == [(64, 64), (64, 64)]
    assert events[-1].eta_s == 0 and all(e.eta_s >= 0 for e in events)


def test_each_job_of_a_batch_sees_its_own_previews(gate: Gate) -> None:
    def last_preview(engine: Engine, seeds: list[int]) -> list[np.ndarray]:
        jobs = [engine.submit(order(seed), preview_every=3) for seed in seeds]
        shown: list[Any] = [None] * len(jobs)
        for k, job in enumerate(jobs):
            job.subscribe(lambda event, k=k: shown.__setitem__(k, event.previews))
        gate.open.set()
        for job in jobs:
            job.result(60)
        return [np.asarray(images[0], np.int16) for images in shown]

    with Engine(gate) as engine:
        together = last_preview(engine, [1, 2, 3])
        singly = [last_preview(engine, [seed])[0] for seed in (1, 2, 3)]
    for one, other in zip(together, singly):
        assert np.abs(one - other).max() <= 2
    assert np.abs(together[0] - together[1]).max() > 2


def test_a_subscriber_that_unsubscribes_as_it_is_let_go_holds_nobody_up(gate: Gate) -> None:
    class Watcher:
        def __call__(self, _: Progress) -> None: ...

        def __del__(self) -> None:
            self.leave()

    def watch(job: Any) -> None:
        watcher = Watcher()
        watcher.leave = job.subscribe(watcher)  # type: ignore[attr-defined]

    with Engine(gate) as engine:
        job = engine.submit(order(0))
        watch(job)
        cancelling = threading.Thread(target=job.cancel, daemon=True)
        cancelling.start()
        cancelling.join(20)
        gate.open.set()
        assert not cancelling.is_alive()


def test_progress_that_comes_while_somebody_subscribes_does_not_come_before_what_is_older(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from idgen import jobs

    call, seen = jobs._call, list[int]()
    first, second = (Progress(step, 9, None, 0.0) for step in (1, 2))

    def overtaken(callback: Callable[[Any], object], value: Any) -> None:
        if value is first:
            job.publish(second)  # as the engine's thread may, just before the first is told
        call(callback, value)

    with Engine(gate) as engine:
        job = engine.submit(order(0))
        job.publish(first)
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "_call", overtaken)
            job.subscribe(lambda progress: seen.append(progress.step))
        gate.open.set()
        job.result(60)
    assert seen[:2] == [1, 2]


def test_a_result_that_is_not_there_yet_times_out_and_the_job_goes_on(gate: Gate) -> None:
    with Engine(gate) as engine:
        job = engine.submit(order(0))
        with pytest.raises(TimeoutError):
            job.result(0.01)
        gate.open.set()
        assert len(job.result(60)) == 1


def test_cancelling_a_running_job_stops_the_sampler_within_two_steps() -> None:
    steps = 0

    class Counting:
        name = PIPELINE
        backbone = tiny.shared(PIPELINE).backbone
        order = tiny.shared(PIPELINE).order

        def denoise(self, orders: list[Order], callback: Any) -> Any:
            def count(step: Any) -> Any:
                nonlocal steps
                steps += 1
                return callback(step)

            return tiny.shared(PIPELINE).denoise(orders, callback=count)

        finish = tiny.shared(PIPELINE).finish

    with Engine(lambda name: Counting()) as engine:  # type: ignore[arg-type,return-value]
        job = engine.submit(order(0, steps=200))
        event = next(job.events())
        assert job.state == "running" and job.position == 0
        assert job.cancel()
        assert not job.cancel()
        reached = steps
        with pytest.raises(Cancelled):
            job.result(0)
        assert job.state == "cancelled"
        engine.submit(order(1)).result(60)  # the engine is free again long before 200 steps
        assert steps <= reached + 2 + 3
        assert event.total == 200


def test_cancelling_one_of_a_batch_leaves_the_others_alone(gate: Gate) -> None:
    with Engine(gate) as engine:
        jobs = [engine.submit(order(seed, steps=20), preview_every=1) for seed in range(3)]
        jobs[1].subscribe(lambda progress: jobs[1].cancel())
        gate.open.set()
        assert_same_pictures(jobs[2].result(60), alone(order(2, steps=20)))
        jobs[0].result(60)
        with pytest.raises(Cancelled):
            jobs[1].result(60)
        assert engine.stats().cancelled == 1


def test_a_deadline_ends_a_job_that_waits_and_one_that_runs(gate: Gate) -> None:
    gate.open.set()
    with Engine(gate, batching=False) as engine:
        running = engine.submit(order(0, steps=1000), deadline=0.4)
        waiting = engine.submit(order(1), deadline=0.1)
        for job in (waiting, running):
            with pytest.raises(DeadlineExceeded, match="within"):
                job.result(60)
        engine.submit(order(2), deadline=60).result(60)


def test_deadlines_end_jobs_while_a_model_loads(gate: Gate) -> None:
    with Engine(gate) as engine:
        loading = engine.submit(order(0), deadline=0.05)
        wait_until(lambda: gate.loads == 1)
        patient, waiting = engine.submit(order(1), deadline=3e300), engine.submit(order(2), deadline=0.05)
        for job in (loading, waiting):
            with pytest.raises(DeadlineExceeded, match="within"):
                job.result(30)  # nothing but the deadline can end it: the gate is closed
        assert waiting.position == 0 and patient.position == 1
        gate.open.set()
        assert_same_pictures(patient.result(60), alone(order(1)))


def test_closing_finishes_what_is_queued_and_refuses_what_comes_later() -> None:
    engine = Engine(lambda name: tiny.shared(PIPELINE))
    jobs = [engine.submit(order(seed)) for seed in range(3)]
    engine.close(drain=True)
    assert [job.state for job in jobs] == ["done"] * 3
    with pytest.raises(EngineClosed):
        engine.submit(order(4))


def test_closing_at_once_or_after_a_timeout_cancels_what_is_left() -> None:
    for how in ({"drain": False}, {"drain": True, "timeout": 0.2}):
        engine = Engine(lambda name: tiny.shared(PIPELINE), batching=False)
        jobs = [engine.submit(order(seed, steps=1000)) for seed in range(2)]
        engine.close(**how)  # type: ignore[arg-type]
        for job in jobs:
            with pytest.raises(EngineClosed):
                job.result(0)


def test_a_closed_engine_leaves_no_thread_behind(gate: Gate) -> None:
    before = set(threading.enumerate())
    for drain in (True, False):
        gate.open.set()
        engine = Engine(gate)
        job = engine.submit(order(0), deadline=60)
        engine.close(drain=drain)
        assert job.done
        own = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("idgen")]
        wait_until(lambda own=own: not any(thread.is_alive() for thread in own))
