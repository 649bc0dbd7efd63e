"""What goes wrong in the engine goes wrong for the request at hand only: bad requests, bugs, panics, callbacks."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import pytest

from idgen.engine import DeadlineExceeded, Engine
from idgen.errors import BadRequest
from idgen.method import Order
from idgen.pipeline import Pipeline
from tests import tiny
from tests.engines import PIPELINE, Gate, alone, assert_same_pictures, order, wait_until

pytestmark = pytest.mark.usefixtures("engine_overlap")


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
