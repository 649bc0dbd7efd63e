"""Pipelines in memory: those asked for in advance stay, of all others only so many."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from idgen import api
from idgen.engine import Engine
from idgen.errors import BadRequest
from idgen.residents import SPARE, Residents
from tests import tiny
from tests.engines import PIPELINE, order


class Loader:
    def __init__(self) -> None:
        self.loads: list[str] = []

    def __call__(self, name: str) -> Any:
        self.loads.append(name)
        if name == "bad":
            raise BadRequest("there is no pipeline 'bad'.", "pipeline")
        return SimpleNamespace(name="best" if name == "auto" else name)


def names(residents: Residents) -> list[str]:
    return [pipeline.name for pipeline in residents.all()]


def test_of_pipelines_that_nobody_asked_for_in_advance_the_most_recently_used_stay() -> None:
    load = Loader()
    residents = Residents(load, keep=("auto", "a"), spare=2)
    for name in ("auto", "a", "x", "y", "x", "z"):
        residents.get(name)
    assert names(residents) == ["best", "a", "x", "z"]
    assert residents.known("y") is None and residents.known("best") is residents.known("auto")
    residents.get("y")
    assert load.loads == ["auto", "a", "x", "y", "z", "y"] and names(residents) == ["best", "a", "z", "y"]
    for k in range(50):
        residents.get(f"combination {k}")
        assert len(residents.all()) == 4


def test_there_is_room_before_the_next_is_loaded_and_a_failed_load_costs_one_place_at_most() -> None:
    most = 0

    def load(name: str) -> Any:
        nonlocal most
        most = max(most, len(residents.all()) + 1)
        return Loader()(name)

    residents = Residents(load, spare=3)
    for name in "abcde":
        residents.get(name)
    assert most == 3
    for _ in range(5):
        with pytest.raises(BadRequest):
            residents.get("bad")
    assert names(residents) == ["d", "e"]


def test_the_engine_frees_what_clients_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    base = tiny.backbone()

    def load(name: str) -> Any:
        pipeline = tiny.load(PIPELINE, base)
        pipeline.methods[0].name = name  # type: ignore[misc]
        made.append(weakref.ref(pipeline.methods[0].adapter))
        return pipeline

    with Engine(load, keep=["first"]) as engine:
        for name in ["first", *(f"other {k}" for k in range(SPARE + 3))]:
            engine.submit(order(1, pipeline=name)).result(60)
        gc.collect()
        alive = [ref() is not None for ref in made]
        assert alive == [True] + [False] * 3 + [True] * SPARE
        assert len(engine.loaded()) == SPARE + 1
        engine.submit(order(1, pipeline="other 0")).result(60)  # forgotten, it is loaded again
        assert len(made) == SPARE + 5


def test_calls_of_the_library_keep_so_many_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Loader()
    monkeypatch.setattr(api, "load", lambda name, **_: load(name))
    api.unload()
    for name in [*"abcd", "a", "e", "a"]:
        api.resident(name)
    assert load.loads == [*"abcde"] and len(api._loaded) == SPARE
    api.resident("b")
    assert load.loads == [*"abcdeb"] and len(api._loaded) == SPARE
    api.unload()


def test_an_engine_loads_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Loader()
    monkeypatch.setattr(api, "load", lambda name, **settings: (settings == {"base": "mini"} or 1 / 0) and load(name))
    with Engine({"base": "mini", "offload": None}) as engine:
        engine.pipeline("a")
    assert load.loads == ["a"] and "a" not in [key[0] for key in api._loaded]
