"""What portraits were made from is kept whole, once, or not at all; and a portrait never depends on it."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from idgen import memory
from idgen.errors import BadRequest
from idgen.identity import Identity

THINGS: list[Any] = [
    Image.new("RGB", (20, 10), "red"),
    np.arange(10, dtype=np.float32).reshape(5, 2),
    Identity(np.linspace(-1, 1, 512, dtype=np.float32)),
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IDGEN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("thing", THINGS, ids=["picture", "points", "identity"])
def test_what_is_remembered_comes_back_and_is_kept_once(thing: Any, home: Path) -> None:
    name = memory.remember(thing)
    assert memory.remember(thing) == name
    assert [file.name for file in (home / "inputs").iterdir()] == [name]
    back = memory.recall(name)
    assert back == thing if isinstance(thing, Identity) else np.array_equal(np.asarray(back), np.asarray(thing))


def test_forgetting_gives_the_same_name_and_writes_nothing(home: Path) -> None:
    with memory.forgetting():
        names = [memory.remember(thing) for thing in THINGS]
    assert not home.exists()
    assert names == [memory.remember(thing) for thing in THINGS]


@pytest.mark.parametrize("thing", THINGS, ids=["picture", "points", "identity"])
def test_a_folder_that_cannot_be_written_costs_a_warning_and_no_portrait(
    thing: Any, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home.mkdir()
    (home / "inputs").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "idgen"):
        name = memory.remember(thing)
    assert "--like" in caplog.text and "IDGEN_HOME" in caplog.text
    with pytest.raises(BadRequest, match="not on this machine"):
        memory.recall(name)


def test_two_may_keep_the_same_picture_at_once(home: Path) -> None:
    picture = Image.effect_noise((600, 600), 90).convert("RGB")
    start, failures = threading.Barrier(4), []

    def keep() -> None:
        start.wait()
        try:
            memory._keep(home / "inputs" / "one.png", picture)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=keep, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [file.name for file in (home / "inputs").iterdir()] == ["one.png"]
