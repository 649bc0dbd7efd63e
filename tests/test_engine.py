"""The engine: bounded queue, dynamic batching, cancelling, deadlines, and nobody's picture in another's hands."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from idgen.engine import Busy, DeadlineExceeded, Engine, EngineClosed, Progress
from idgen.errors import BadRequest, Cancelled, IdgenError
from idgen.method import Order
from idgen.pipeline import Pipeline
from idgen.request import Request
from tests import tiny

PIPELINE = "ip-adapter-faceid-plusv2"


class Gate:
    """A loader whose first call waits, so that a test can fill the queue first."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.loads = 0

    def __call__(self, name: str) -> Pipeline:
        self.loads += 1
        assert self.open.wait(30)
        return tiny.shared(PIPELINE if name == "auto" else name)


@pytest.fixture(autouse=True, params=[False, True], ids=["in turn", "overlapped"])
def overlap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test holds whether pictures are decoded between two runs or beside the next; the latter as on CUDA."""
    monkeypatch.setattr(tiny.shared(PIPELINE).backbone, "overlap", request.param)
    return request.param


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def order(number: int, **fields: Any) -> Request:
    given = {"who": tiny.person(number), "prompt": f"portrait {number}", "pipeline": PIPELINE, "seed": number}
    return Request.create(**{**given, **tiny.SMALL, **fields})


def alone(request: Request) -> list[np.ndarray]:
    """What the pipeline makes of the request without an engine."""
    return [np.asarray(p.image, np.int16) for p in tiny.shared(PIPELINE).generate_many([request])[0]]


def assert_same_pictures(portraits: Any, expected: list[np.ndarray]) -> None:
    """Equal but for the rounding of another batch size."""
    assert len(portraits) == len(expected)
    for portrait, image in zip(portraits, expected):
        assert np.abs(np.asarray(portrait.image, np.int16) - image).max() <= 2


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_waiting_requests_share_one_unet_call_and_each_gets_its_own_picture(gate: Gate) -> None:
    with Engine(gate, max_batch=8) as engine:
        engine.submit(order(0))
        wait_until(lambda: gate.loads == 1)
        jobs = [engine.submit(order(seed, n=1 + seed % 2)) for seed in range(1, 6)]
        assert [job.position for job in jobs] == [1, 2, 3, 4, 5]
        gate.open.set()
        for seed, job in enumerate(jobs, 1):
            assert_same_pictures(job.result(60), alone(order(seed, n=1 + seed % 2)))
        assert engine.stats().batch_sizes == {1: 1, 8: 1}
        assert engine.stats().served == 6


def test_requests_that_differ_in_size_or_steps_do_not_share_a_call(gate: Gate) -> None:
    with Engine(gate) as engine:
        engine.submit(order(0))
        wait_until(lambda: gate.loads == 1)
        jobs = [engine.submit(order(1)), engine.submit(order(2, steps=2)), engine.submit(order(3, width=72))]
        jobs += [engine.submit(order(4, guidance=1.0)), engine.submit(order(5))]
        gate.open.set()
        for job in jobs:
            assert_same_pictures(job.result(60), alone(job.request))
        assert engine.stats().batch_sizes == {1: 4, 2: 1}


def test_a_default_that_is_named_joins_one_that_is_left_open(gate: Gate) -> None:
    pipeline = tiny.shared(PIPELINE)
    open_ = order(1, steps=None, width=None, height=None)
    named = open_.change(**{**pipeline.settings(open_), "prompt": "another", "seed": 2})
    assert open_.steps is None and named.steps == 30 and named.width == pipeline.backbone.default_size
    with Engine(gate) as engine:
        engine.submit(order(0))
        wait_until(lambda: gate.loads == 1)
        jobs = [engine.submit(each) for each in (open_, named, named.change(steps=29))]
        gate.open.set()
        for job in jobs:
            job.result(60)
        assert engine.stats().batch_sizes == {1: 2, 2: 1}


def test_without_batching_every_request_runs_alone(gate: Gate) -> None:
    with Engine(gate, batching=False) as engine:
        jobs = [engine.submit(order(seed)) for seed in range(3)]
        gate.open.set()
        for job in jobs:
            job.result(60)
        assert engine.stats().batch_sizes == {1: 3}


def test_auto_and_the_name_it_stands_for_share_a_pipeline_and_calls(gate: Gate) -> None:
    gate.open.set()
    with Engine(gate) as engine:
        assert engine.pipeline("auto") is engine.pipeline(PIPELINE)
        assert engine.loaded() == [engine.pipeline("auto")]


def test_a_large_order_runs_in_parts_that_make_the_same_pictures(gate: Gate) -> None:
    gate.open.set()
    with Engine(gate, max_batch=2) as engine:
        seen: list[Progress] = []
        job = engine.submit(order(3, n=5))
        job.subscribe(seen.append)
        portraits = job.result(60)
        assert [p.seed for p in portraits] == [3, 4, 5, 6, 7]
        assert_same_pictures(portraits, alone(order(3, n=5)))
        assert engine.stats().batch_sizes == {2: 2, 1: 1}
        assert seen[-1].step == seen[-1].total == 9


def test_a_large_order_does_not_keep_small_ones_waiting(gate: Gate) -> None:
    with Engine(gate, max_batch=2) as engine:
        ended: list[str] = []
        large, small = engine.submit(order(1, n=6)), engine.submit(order(2, steps=2))
        large.add_done_callback(lambda _: ended.append("large"))
        small.add_done_callback(lambda _: ended.append("small"))
        gate.open.set()
        large.result(60)
        assert ended == ["small", "large"]


def test_a_full_queue_refuses_and_says_when_to_come_back(gate: Gate) -> None:
    with Engine(gate, queue_size=2) as engine:
        engine.submit(order(0))
        wait_until(lambda: gate.loads == 1)
        waiting = [engine.submit(order(1)), engine.submit(order(2))]
        with pytest.raises(Busy) as caught:
            engine.submit(order(3))
        assert caught.value.retry_after >= 1
        assert engine.stats().rejected == 1
        waiting[0].cancel()
        assert waiting[1].position == 1
        engine.submit(order(3))  # the cancelled one's place is free
        gate.open.set()


def test_a_wrong_request_fails_alone_and_its_neighbours_are_served(gate: Gate) -> None:
    with Engine(gate) as engine:
        engine.submit(order(0))
        wait_until(lambda: gate.loads == 1)
        good, bad, other = engine.submit(order(1)), engine.submit(order(2, who=None)), engine.submit(order(3))
        gate.open.set()
        with pytest.raises(BadRequest, match="photo"):
            bad.result(60)
        assert bad.state == "failed"
        assert_same_pictures(good.result(60), alone(order(1)))
        assert_same_pictures(other.result(60), alone(order(3)))


def test_a_long_prompt_does_not_change_the_pictures_of_the_short_ones_it_waits_with(gate: Gate) -> None:
    long = ", ".join(f"a man in the forest number {i}" for i in range(40))
    with Engine(gate) as engine:
        jobs = [engine.submit(order(seed, prompt=long if seed == 1 else "a man")) for seed in range(3)]
        gate.open.set()
        for seed, job in enumerate(jobs):
            assert_same_pictures(job.result(60), alone(order(seed, prompt=long if seed == 1 else "a man")))
        first = engine.submit(order(9))  # now the pipeline is known
        rest = [engine.submit(order(seed, prompt=long if seed == 1 else "a man")) for seed in range(3)]
        first.result(60)
        for seed, job in enumerate(rest):
            assert_same_pictures(job.result(60), alone(order(seed, prompt=long if seed == 1 else "a man")))


def test_a_request_that_cannot_be_sorted_runs_alone_and_the_engine_lives_on(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from idgen import text

    real = text.fits

    def fits(backbone: Any, prompt: str) -> bool:
        if prompt == "odd":
            raise RuntimeError("the tokenizer broke")
        return real(backbone, prompt)

    monkeypatch.setattr(text, "fits", fits)
    with Engine(gate) as engine:
        engine.submit(order(0))
        wait_until(lambda: gate.loads == 1)
        jobs = [engine.submit(order(seed, prompt="odd" if seed == 1 else "a man")) for seed in range(4)]
        gate.open.set()
        with pytest.raises(RuntimeError, match="tokenizer"):  # its own error, and nobody else's
            jobs[1].result(60)
        for seed in (0, 2, 3):
            assert_same_pictures(jobs[seed].result(60), alone(order(seed, prompt="a man")))
        assert engine.stats().batch_sizes == {1: 1, 3: 1}


def test_whatever_breaks_in_the_engines_own_thread_fails_the_job_at_hand_only(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError("oops")

        __hash__ = None  # type: ignore[assignment]

    with Engine(gate) as engine:
        engine.submit(order(0))
        wait_until(lambda: gate.loads == 1)
        first, second = engine.submit(order(1)), engine.submit(order(2))
        first.key = Odd()  # type: ignore[assignment]
        gate.open.set()
        with pytest.raises(ZeroDivisionError):
            first.result(60)
        second.result(60)


def test_a_prompt_is_counted_once_and_nobody_waits_for_it(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    from idgen import text

    counted: list[str] = []
    reached, release = threading.Event(), threading.Event()

    def fits(backbone: Any, prompt: str) -> bool:
        if prompt.startswith("portrait"):
            counted.append(prompt)
        if prompt == "portrait 1":
            reached.set()
            assert release.wait(30)
        return True

    with Engine(gate) as engine:
        gate.open.set()
        engine.submit(order(0)).result(60)
        with monkeypatch.context() as patch:
            patch.setattr(text, "fits", fits)
            jobs = [engine.submit(order(seed, steps=seed)) for seed in (1, 2, 3)]
            assert reached.wait(30)
            asked = threading.Thread(target=lambda: (jobs[2].cancel(), engine.stats(), engine.submit(order(4))))
            asked.start()
            asked.join(30)
            assert not asked.is_alive() and jobs[2].done  # while a prompt is being counted
            release.set()
            for job in jobs[:2]:
                job.result(60)
    assert all(counted.count(f"portrait {seed}") <= 2 for seed in (1, 2))  # to sort it, and to encode it


def test_a_very_long_prompt_is_not_counted_to_know_that_it_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from idgen import text
    from idgen.batching import batch_key

    monkeypatch.setattr(text, "fits", lambda *_: pytest.fail("counted"))
    pipeline = tiny.shared(PIPELINE)
    one, two = (Request.create(prompt=word * 30000, pipeline=PIPELINE) for word in "ab")
    assert batch_key(pipeline, one) != batch_key(pipeline, two)
    assert batch_key(pipeline, one) == batch_key(pipeline, one.change(seed=3))


def test_a_batch_that_cannot_run_together_is_run_one_by_one(gate: Gate) -> None:
    together: list[int] = []
    held: list[weakref.ref[np.ndarray]] = []

    class Fussy:
        name = PIPELINE
        backbone = tiny.shared(PIPELINE).backbone
        settings = tiny.shared(PIPELINE).settings
        order = tiny.shared(PIPELINE).order

        def denoise(self, orders: list[Order], callback: Any) -> Any:
            together.append(len(orders))
            if len(orders) > 1:
                tensors = np.zeros(1)
                held.append(weakref.ref(tensors))
                raise BadRequest("too many at once", "n")
            assert all(tensors() is None for tensors in held), "what the failed call used is in the way of the next"
            return tiny.shared(PIPELINE).denoise(orders, callback=callback)

        finish = tiny.shared(PIPELINE).finish

    def load(name: str) -> Any:
        gate(name)
        return Fussy()

    with Engine(load) as engine:
        jobs = [engine.submit(order(seed)) for seed in range(4)]
        gate.open.set()
        for seed, job in enumerate(jobs):
            assert_same_pictures(job.result(60), alone(order(seed)))
    assert max(together) > 1 and held


def test_an_unknown_pipeline_fails_its_request_only() -> None:
    def load(name: str) -> Pipeline:
        if name != PIPELINE:
            raise BadRequest(f"there is no pipeline {name!r}.", "pipeline")
        return tiny.shared(name)

    with Engine(load) as engine:
        with pytest.raises(BadRequest, match="nonsense"):
            engine.submit(order(0, pipeline="nonsense")).result(60)
        engine.submit(order(1)).result(60)


def test_a_bug_in_a_method_fails_the_request_and_the_engine_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        name = "broken"
        order = tiny.shared(PIPELINE).order

        def denoise(self, orders: list[Order], callback: Any) -> Any:
            raise ZeroDivisionError("oops")

    with Engine(lambda name: Broken() if name == "broken" else tiny.shared(name)) as engine:  # type: ignore[arg-type,return-value]
        with pytest.raises(ZeroDivisionError):
            engine.submit(order(0, pipeline="broken")).result(60)
        engine.submit(order(1)).result(60)
    assert "failed unexpectedly" in caplog.text


class Panic(BaseException):
    """What a native library raises where its own code broke: no Exception."""


@pytest.mark.parametrize("where", ["load", "denoise", "finish"])
def test_a_panic_of_a_library_fails_its_requests_and_the_engine_lives_on(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, broken = tiny.shared(PIPELINE), True

    def fragile(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if broken and name == where:
                raise Panic("no unwrap today")
            return getattr(whole, name)(*args, **options)

        return call

    class Fragile:
        name, backbone, settings, order = PIPELINE, whole.backbone, whole.settings, whole.order
        denoise, finish = staticmethod(fragile("denoise")), staticmethod(fragile("finish"))

    def load(name: str) -> Any:
        if broken and where == "load":
            raise Panic("no unwrap today")
        return Fragile()

    with Engine(load) as engine:
        jobs = [engine.submit(order(seed)) for seed in range(3)]
        for job in jobs:
            with pytest.raises(RuntimeError, match="Panic: no unwrap today"):
                job.result(20)
        broken = False
        assert_same_pictures(engine.submit(order(1)).result(60), alone(order(1)))
        assert engine.stats().failed == 3 and engine.stats().running == 0
    assert "failed unexpectedly" in caplog.text


@pytest.mark.parametrize("how", ["closes", "exits"])
def test_a_callback_may_close_the_engine_or_try_to_end_the_program_and_nobody_waits_forever(how: str) -> None:
    engine = Engine(lambda name: tiny.shared(PIPELINE))
    called = threading.Event()

    def call(_: Any) -> None:
        called.set()
        if how == "exits":
            raise SystemExit("a caller's mistake")
        engine.close(drain=False)

    first = engine.submit(order(0))
    first.add_done_callback(call)
    first.result(60)
    assert called.wait(30)
    if how == "exits":
        assert len(engine.submit(order(1)).result(20)) == 1
        late = engine.submit(order(2, steps=1000), deadline=0.05)
        late.add_done_callback(call)
        for job in (late, engine.submit(order(3, steps=1000), deadline=0.1)):
            with pytest.raises(DeadlineExceeded):
                job.result(20)
    closing = threading.Thread(target=engine.close, kwargs={"drain": False}, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()


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


def test_callbacks_that_raise_harm_nobody() -> None:
    def bad(_: Any) -> None:
        raise RuntimeError("a caller's mistake")

    with Engine(lambda name: tiny.shared(PIPELINE)) as engine:
        job = engine.submit(order(0))
        job.subscribe(bad)
        job.add_done_callback(bad)
        called: list[str] = []
        job.result(60)
        job.add_done_callback(lambda job: called.append(job.state))
        assert called == ["done"]


def test_a_result_that_is_not_there_yet_times_out_and_the_job_goes_on(gate: Gate) -> None:
    with Engine(gate) as engine:
        job = engine.submit(order(0))
        with pytest.raises(TimeoutError):
            job.result(0.01)
        gate.open.set()
        assert len(job.result(60)) == 1


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


def test_a_seed_left_open_is_decided_once() -> None:
    with Engine(lambda name: tiny.shared(PIPELINE), max_batch=2) as engine:
        job = engine.submit(order(0, seed=None, n=3))
        assert job.request.seed is not None
        assert [p.seed for p in job.result(60)] == [job.request.seed + k for k in range(3)]


@pytest.mark.parametrize("wrong", [{"deadline": 0}, {"deadline": float("nan")}, {"preview_every": -1}])
def test_submit_refuses_arguments_out_of_bounds(wrong: dict[str, Any]) -> None:
    with Engine(lambda name: tiny.shared(PIPELINE)) as engine, pytest.raises(BadRequest):
        engine.submit(order(0), **wrong)


@pytest.mark.parametrize("wrong", [{"queue_size": 0}, {"max_batch": 0}])
def test_an_engine_refuses_settings_out_of_bounds(wrong: dict[str, int]) -> None:
    with pytest.raises(IdgenError):
        Engine(**wrong)


def test_many_threads_get_their_own_pictures_and_none_is_lost() -> None:
    expected = {seed: alone(order(seed))[0] for seed in range(8)}
    wrong: list[int] = []

    def client(seed: int) -> None:
        for _ in range(4):
            image = np.asarray(engine.submit(order(seed)).result(120)[0].image, np.int16)
            nearest = min(expected, key=lambda k: int(np.abs(expected[k] - image).sum()))
            if nearest != seed or np.abs(expected[seed] - image).max() > 2:
                wrong.append(seed)

    with Engine(lambda name: tiny.shared(PIPELINE), max_batch=4) as engine:
        threads = [threading.Thread(target=client, args=(seed,)) for seed in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert engine.stats().served == 32
        assert max(engine.stats().batch_sizes) > 1


@pytest.mark.parametrize("keep", [False, True])
def test_inputs_are_written_to_disk_only_when_asked(
    keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IDGEN_HOME", str(tmp_path))
    with Engine(lambda name: tiny.shared(PIPELINE), keep_inputs=keep) as engine:
        portrait = engine.submit(order(0)).result(60)[0]
    kept = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert kept == ([portrait.provenance["inputs"]["who"]] if keep else [])
    assert portrait.provenance["inputs"]["who"].endswith(".safetensors")
