"""Kept across requests: the person costs the image encoder and the projection once, and no number changes by it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import idgen
from idgen.caches import TensorCache, content_key, weights_state
from idgen.method import Method
from idgen.pipeline import Pipeline
from tests import tiny


def load(name: str) -> Pipeline:
    if name == "arc2face":
        return idgen.load(name, base="mini-sd15", device="cpu", dtype="float32")
    return tiny.load(name)


def who(name: str, seed: int = 0) -> Any:
    return tiny.person(seed).crop if name == "ip-adapter" else tiny.person(seed)


class Count:
    """Counts the calls of a method's modules: projection, image encoder, own text encoder."""

    def __init__(self, method: Method) -> None:
        self.calls = 0
        parts = [getattr(getattr(method, "adapter", None), "projection", None), getattr(method, "encoder", None)]
        for part in parts:
            model = getattr(part, "model", part)
            if model is not None:
                model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def during(self, run: Any) -> int:
        self.calls = 0
        run()
        return self.calls


@pytest.mark.parametrize("name", ["ip-adapter", "ip-adapter-faceid-plusv2", "instantid", "arc2face"])
def test_a_known_person_runs_neither_encoder_nor_projection_again_and_no_number_changes(name: str) -> None:
    pipeline = load(name)
    method = pipeline.methods[0]
    count = Count(method)
    prompt = "" if name == "arc2face" else "a man"

    def run(person: int = 0, **fields: Any) -> torch.Tensor:
        given = {"seed": 1, "output": "latent", **tiny.SMALL, **fields}
        return pipeline.generate(who(name, person), prompt, **given)

    first = run()
    assert count.during(run) == 0
    assert count.during(lambda: run(seed=2, steps=2)) == 0
    again = run()
    method.cache.clear()
    assert count.during(run) > 0
    assert torch.equal(first, again) and torch.equal(first, run())
    assert count.during(lambda: run(1)) > 0
    assert not torch.equal(run(1), first)


def test_another_weight_of_the_refinement_runs_the_projection_but_not_the_image_encoder() -> None:
    pipeline = tiny.load("ip-adapter-faceid-plusv2")
    calls: list[int] = []
    pipeline.methods[0].encoder.model.register_forward_pre_hook(lambda *_: calls.append(1))
    run = lambda weight: pipeline.generate(  # noqa: E731
        tiny.person(), "x", seed=1, structure_scale=weight, output="latent", **tiny.SMALL
    )
    one = run(1.0)
    assert len(calls) == 2  # the face and the blank
    half = run(0.5)
    assert len(calls) == 2 and not torch.equal(one, half)
    pipeline.methods[0].cache.clear()
    assert torch.equal(run(0.5), half)


def test_weights_that_were_written_to_make_the_tokens_anew() -> None:
    pipeline = tiny.load("instantid")
    projection = pipeline.methods[0].adapter.projection
    run = lambda: pipeline.generate(tiny.person(), "x", seed=1, output="latent", **tiny.SMALL)  # noqa: E731
    before, state = run(), weights_state(projection)
    with torch.no_grad():
        projection.latents.mul_(2)
    assert weights_state(projection) != state
    assert not torch.equal(run(), before)


def test_a_setting_that_matters_is_part_of_the_key() -> None:
    pipeline = tiny.load("ip-adapter-faceid-plusv2")
    run = lambda: pipeline.generate(tiny.person(), "x", seed=1, output="latent", **tiny.SMALL)  # noqa: E731
    normed = run()
    pipeline.methods[0].option["normalise"] = False
    assert not torch.equal(run(), normed)


def test_what_was_asked_for_longest_ago_leaves_when_the_cache_is_full() -> None:
    cache = TensorCache(limit=3 * 400)
    made: list[str] = []

    def get(name: str) -> torch.Tensor:
        return cache.get(name, lambda: made.append(name) or torch.zeros(100))  # type: ignore[func-returns-value]

    for name in "abcad":  # b was not asked for since
        get(name)
    assert cache.nbytes == 1200 and len(cache) == 3
    made.clear()
    for name in "acd":
        get(name)
    assert not made
    get("b")
    assert made == ["b"]
    assert cache.get("huge", lambda: torch.zeros(1000)).shape == (1000,)
    assert cache.nbytes <= 1200 and cache.get("huge", lambda: None) is None
    pair = cache.get("pair", lambda: (torch.zeros(100), None))
    assert cache.get("pair", lambda: None) is pair
    cache.clear()
    assert cache.nbytes == len(cache) == 0


def test_threads_share_a_cache_without_losing_count_of_its_bytes() -> None:
    cache = TensorCache(limit=10 * 400)
    wrong: list[int] = []

    def work(offset: int) -> None:
        for k in range(2000):
            number = (k * 7 + offset) % 25
            if cache.get(number, lambda n=number: torch.full((100,), float(n)))[0] != number:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(offset,), daemon=True) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.nbytes == 400 * len(cache) <= 4000


def test_keys_tell_values_shapes_types_and_pictures_apart() -> None:
    ones = np.ones((1, 4), np.float32)
    white, black = Image.new("RGB", (4, 4), "white"), Image.new("RGB", (4, 4))
    keys = [
        content_key(ones),
        content_key(ones.reshape(2, 2)),
        content_key(ones.astype(np.float64)),
        content_key(ones * 2),
        content_key(ones, white),
        content_key(ones, black),
        content_key(black, white),
        content_key(white, black),
    ]
    assert len(set(keys)) == len(keys)
    assert content_key(ones.copy(), white.copy()) == content_key(ones, white)
