"""The engine: bounded queue, dynamic batching, and nobody's picture in another's hands."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from idgen.engine import Busy, Engine, Progress
from idgen.errors import BadRequest, IdgenError
from idgen.request import Request
from tests import tiny
from tests.engines import PIPELINE, Gate, alone, assert_same_pictures, order, wait_until

pytestmark = pytest.mark.usefixtures("engine_overlap")


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
        threads = [threading.Thread(target=client, args=(seed,), daemon=True) for seed in expected]
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
