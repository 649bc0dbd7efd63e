"""Decoding beside the next denoising: the same pictures to the same jobs, errors where they belong, memory bounded."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from idgen.backbone import _may_overlap
from idgen.engine import Engine, EngineClosed
from idgen.errors import Cancelled, IdgenError, OutOfMemory
from idgen.method import Order
from idgen.overlap import Denoised, Finisher
from idgen.pipeline import Pipeline
from idgen.portrait import Portrait
from idgen.request import Request
from tests import tiny
from tests.engines import PIPELINE, alone, assert_same_pictures, order, wait_until


class Watched:
    """The tiny pipeline, with a hook before each denoising and each finishing, and a count of both."""

    name = PIPELINE

    def __init__(self) -> None:
        self.real: Pipeline = tiny.shared(PIPELINE)
        self.backbone = self.real.backbone
        self.settings = self.real.settings
        self.before_denoising: Callable[[int], None] = lambda seed: None
        self.before_finishing: Callable[[int], None] = lambda seed: None
        self.ordered: list[int | None] = []
        self.denoised: list[int] = []
        self.finished: list[int] = []
        self.most_unfinished = 0

    def order(self, request: Request) -> Order:
        self.ordered.append(request.seed)
        return self.real.order(request)

    def denoise(self, orders: list[Order], callback: Any) -> Denoised:
        self.before_denoising(orders[0].seeds[0])
        made = self.real.denoise(orders, callback=callback)
        self.denoised.append(orders[0].seeds[0])
        self.most_unfinished = max(self.most_unfinished, len(self.denoised) - len(self.finished))
        return made

    def finish(self, denoised: Denoised) -> list[list[Portrait]]:
        self.before_finishing(denoised.orders[0].seeds[0])
        made = self.real.finish(denoised)
        self.finished.append(denoised.orders[0].seeds[0])
        return made


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setattr(tiny.shared(PIPELINE).backbone, "overlap", True)
    yield Watched()


def engine_of(watched: Watched, **settings: Any) -> Engine:
    return Engine(lambda name: watched, batching=False, **settings)  # type: ignore[arg-type,return-value]


def test_the_next_job_is_denoised_while_the_last_is_decoded_and_no_more_than_that(watched: Watched) -> None:
    release = threading.Event()
    watched.before_finishing = lambda seed: None if seed else wait_for(release)
    with engine_of(watched) as engine:
        jobs = [engine.submit(order(seed)) for seed in range(4)]
        wait_until(lambda: watched.denoised == [0, 1])  # 0 is still in the decoder's hands
        assert watched.finished == [] and not jobs[0].done
        assert engine.stats().running == 2
        release.set()
        for seed, job in enumerate(jobs):
            assert_same_pictures(job.result(60), alone(order(seed)))
    assert watched.finished == [0, 1, 2, 3]
    assert watched.most_unfinished <= 2


def wait_for(event: threading.Event) -> None:
    assert event.wait(30)


def test_an_error_of_the_decoding_reaches_its_own_job(watched: Watched) -> None:
    def fail(seed: int) -> None:
        if seed == 1:
            raise IdgenError("the VAE overflowed")

    watched.before_finishing = fail
    with engine_of(watched) as engine:
        jobs = [engine.submit(order(seed)) for seed in range(3)]
        with pytest.raises(IdgenError, match="overflowed"):
            jobs[1].result(60)
        for seed in (0, 2):
            assert_same_pictures(jobs[seed].result(60), alone(order(seed)))
        assert engine.stats().failed == 1


def test_a_batch_that_cannot_be_decoded_together_is_decoded_one_by_one(watched: Watched) -> None:
    sizes: list[int] = []
    whole = watched.finish

    def finish(denoised: Denoised) -> list[list[Portrait]]:
        sizes.append(len(denoised.orders))
        if len(denoised.orders) > 1:
            raise OutOfMemory("too many at once")
        if denoised.orders[0].seeds[0] == 2:
            raise IdgenError("this one's own fault")
        return whole(denoised)

    watched.finish = finish  # type: ignore[method-assign]
    gate = threading.Event()
    watched.before_denoising = lambda seed: None if seed else wait_for(gate)
    with Engine(lambda name: watched) as engine:  # type: ignore[arg-type,return-value]
        first = engine.submit(order(0))
        wait_until(lambda: first.state == "running")
        jobs = [engine.submit(order(seed)) for seed in (1, 2, 3)]
        gate.set()
        for seed, job in zip((1, 3), (jobs[0], jobs[2])):
            assert_same_pictures(job.result(60), alone(order(seed)))
        with pytest.raises(IdgenError, match="own fault"):
            jobs[1].result(60)
    assert sizes == [1, 3, 1, 1, 1]


def test_a_job_cancelled_while_it_is_decoded_ends_at_once_and_gets_nothing(watched: Watched) -> None:
    release, reached = threading.Event(), threading.Event()

    def hold(seed: int) -> None:
        if seed == 0:
            reached.set()
            wait_for(release)

    watched.before_finishing = hold
    with engine_of(watched) as engine:
        job, other = engine.submit(order(0)), engine.submit(order(1))
        wait_for(reached)
        assert job.cancel()
        with pytest.raises(Cancelled):
            job.result(0)
        release.set()
        other.result(60)
        assert job.portraits == [] and engine.stats().cancelled == 1
        assert engine.stats().images == 1


def test_a_job_in_parts_gets_its_pictures_in_order_and_shares_the_engine(watched: Watched) -> None:
    # The last part is denoised before the one before it is handed over: the job is not complete with that.
    watched.before_finishing = lambda seed: wait_until(lambda: seed != 1 or 2 in watched.denoised)
    with engine_of(watched, max_batch=1) as engine:
        job, other = engine.submit(order(0, n=3)), engine.submit(order(9))
        assert [p.seed for p in job.result(60)] == [0, 1, 2]
        other.result(60)
    assert sorted(watched.finished) == [0, 1, 2, 9]
    assert watched.finished.index(9) < watched.finished.index(2)


def test_closing_waits_for_what_is_decoded_or_gives_it_up(watched: Watched) -> None:
    release, reached = threading.Event(), threading.Event()

    def hold(_: int) -> None:
        reached.set()
        wait_for(release)

    watched.before_finishing = hold
    before = set(threading.enumerate())
    engine = engine_of(watched)
    job = engine.submit(order(0))
    wait_for(reached)
    threading.Timer(0.1, release.set).start()
    engine.close(drain=True)
    assert job.state == "done" and len(job.result(0)) == 1

    release.clear()
    reached.clear()
    engine = engine_of(watched)
    job = engine.submit(order(0))
    wait_for(reached)
    threading.Timer(0.1, release.set).start()
    engine.close(drain=False)
    with pytest.raises(EngineClosed):
        job.result(0)
    assert not any(thread.name.startswith("idgen-finish") for thread in set(threading.enumerate()) - before)


def test_a_run_that_does_not_fit_beside_a_decoding_is_run_again_after_it(watched: Watched) -> None:
    release = threading.Event()
    tries: list[int] = []
    held: list[weakref.ref[torch.Tensor]] = []

    def scarce(seed: int) -> None:
        tries.append(seed)
        assert all(tensors() is None for tensors in held), "what the failed call used is in the way of the next"
        if tries == [0, 1]:
            tensors = torch.zeros(1)
            held.append(weakref.ref(tensors))
            threading.Timer(0.1, release.set).start()
            raise OutOfMemory("both at once are too much")

    watched.before_denoising = scarce
    watched.before_finishing = lambda seed: None if seed else wait_for(release)
    with engine_of(watched) as engine:
        jobs = [engine.submit(order(seed)) for seed in range(2)]
        for seed, job in enumerate(jobs):
            assert_same_pictures(job.result(60), alone(order(seed)))
    assert tries == [0, 1, 1] and watched.ordered == [0, 1], "what was decided is not decided again"


def test_a_decoding_that_does_not_fit_beside_a_run_waits_for_its_end() -> None:
    backbone = tiny.backbone()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = backbone.decode(latents)
    backbone.overlap = True
    decode, tries = backbone.vae.decode, []

    def scarce(*args: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("both at once are too much")
        return decode(*args)

    backbone.vae.decode = scarce
    with backbone.lock:  # a run of the sampler
        made: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: made.append(backbone.decode(latents)))
        thread.start()
        wait_until(lambda: len(tries) == 1)
        thread.join(0.05)
        assert not made
    thread.join(30)
    assert len(tries) == 2 and torch.equal(made[0], expected)


def test_pictures_are_decoded_about_a_megapixel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny.load(PIPELINE)
    sizes: list[int] = []
    whole = pipeline.backbone.vae.decode
    monkeypatch.setattr(pipeline.backbone.vae, "decode", lambda z, **k: sizes.append(len(z)) or whole(z, **k))
    denoised = pipeline.denoise([order(seed, n=3) for seed in (1, 5)])
    together = [np.asarray(made.image) for row in pipeline.finish(denoised) for made in row]
    wide = replace(denoised, orders=[replace(each, width=1024, height=512) for each in denoised.orders])
    apart = [np.asarray(made.image) for row in pipeline.finish(wide) for made in row]
    assert sizes == [6, 2, 2, 2] and len(apart) == 6
    assert max(np.abs(one.astype(int) - other).max() for one, other in zip(together, apart)) <= 1


def test_decoding_needs_the_samplers_lock_only_where_the_two_must_not_overlap() -> None:
    backbone = tiny.backbone()
    latents = torch.zeros(1, 4, 8, 8)
    for overlap in (True, False):
        backbone.overlap = overlap
        made: list[Any] = []
        thread = threading.Thread(target=lambda made=made: made.append(backbone.decode(latents)))
        with backbone.lock:
            thread.start()
            thread.join(30 if overlap else 0.2)
            assert bool(made) == overlap
        thread.join(30)
        assert made


@pytest.mark.parametrize(
    ("device", "offload", "tiling", "expected"),
    [
        ("cuda", None, False, True),
        ("cuda", "model", False, False),
        ("cuda", "sequential", False, False),
        ("cuda", None, True, False),
        ("cpu", None, False, False),
        ("mps", None, False, False),
    ],
)
def test_models_overlap_on_cuda_unless_they_are_offloaded_or_memory_is_scarce(
    device: str, offload: str | None, tiling: bool, expected: bool
) -> None:
    assert _may_overlap(SimpleNamespace(use_tiling=tiling), torch.device(device), offload) is expected


def test_a_backbone_on_a_cpu_does_not_overlap() -> None:
    assert not tiny.backbone().overlap


def test_halves_of_a_run_make_the_same_portraits_as_the_whole() -> None:
    pipeline = tiny.shared(PIPELINE)
    requests = [order(1, n=2), order(2)]
    whole = pipeline.generate_many(requests)
    denoised = pipeline.denoise(requests)
    parts = [pipeline.finish(part)[0] for part in denoised.parts()]
    assert [[p.seed for p in portraits] for portraits in parts] == [[1, 2], [2]]
    for one, other in zip(whole, parts):
        assert_same_pictures(other, [np.asarray(p.image, np.int16) for p in one])


def test_a_program_that_is_ending_still_gets_every_portrait_of_a_batch(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    watched.before_denoising = lambda seed: None if seed else wait_for(gate)
    with Engine(lambda name: watched) as engine:  # type: ignore[arg-type,return-value]
        jobs = [engine.submit(order(0))]
        wait_until(lambda: jobs[0].state == "running")
        jobs += [engine.submit(order(seed)) for seed in (1, 2)]
        with monkeypatch.context() as patch:
            # As at the end of the main thread, while others still wait for portraits: no pool takes anything more.
            patch.setattr("concurrent.futures.thread._shutdown", True)
            gate.set()
            for seed, job in enumerate(jobs):
                assert_same_pictures(job.result(20), alone(order(seed)))


def test_a_finisher_does_one_thing_at_a_time_in_order() -> None:
    finisher, done = Finisher(), []
    assert not finisher.wait()
    release = threading.Event()
    finisher.submit(lambda: (wait_for(release), done.append(1))[0])
    threading.Timer(0.05, release.set).start()
    finisher.submit(lambda: done.append(2))
    assert done[:1] == [1]
    finisher.close()
    assert done == [1, 2]
