"""What a batch does at once: pictures are decoded beside the next denoising, and written on another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import idgen
from idgen.pipeline import Pipeline
from tests import models
from tests.batches import job_folder, pixels, records, render, some_rows


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job_folder(tmp_path_factory)


@pytest.fixture(params=[False, True], ids=["one after the other", "overlapping"])
def overlap(request: pytest.FixtureRequest, job: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether pictures are decoded beside the next denoising, as on CUDA."""
    let_overlap(job, monkeypatch, request.param)
    return bool(request.param)


def let_overlap(job: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool = True) -> None:
    monkeypatch.setattr(idgen.load(models.PIPELINE, **models.settings(job)).backbone, "overlap", overlap)


def test_pictures_order_and_errors_are_the_same_whether_decoding_overlaps_or_not(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    rows = some_rows(job, 7)
    expected = [idgen.load(models.PIPELINE, **models.settings(job)).generate(**alone(row)) for row in rows]
    finish, threads = Pipeline.finish, set[str]()

    def moody(self: Any, denoised: Any) -> Any:
        threads.add(threading.current_thread().name)
        seeds = [order.seeds[0] for order in denoised.orders]
        if 1 in seeds:  # a whole call fails for the sake of one of its rows
            raise RuntimeError("the VAE is ill")
        return finish(self, denoised)

    monkeypatch.setattr(Pipeline, "finish", moody)
    summary = render(job, rows, tmp_path / "out", batch_size=2)
    assert (summary.rendered, summary.failed) == (6, 1)
    assert any(name.startswith("idgen-finish") for name in threads) == overlap
    found = records(tmp_path / "out")
    assert [record["row"] for record in found if record["status"] == "failed"] == [2]
    assert "the VAE is ill" in found[1]["error"]
    assert len(found) == 7
    for record, (portrait,) in zip(found, expected):
        if record["status"] != "failed":
            picture = np.asarray(portrait.image, np.int16)
            assert np.abs(pixels(tmp_path / "out" / record["file"]) - picture).max() <= 1
    monkeypatch.setattr(Pipeline, "finish", finish)
    again = render(job, rows, tmp_path / "out", batch_size=2)
    assert (again.rendered, again.kept) == (1, 6), "what was finished is kept, what failed is tried again"


def alone(row: dict[str, Any]) -> dict[str, Any]:
    side = {"width": 32, "height": 32, "steps": 1, "guidance": 1.0}
    return {"who": row["photo"], "prompt": row["prompt"], "seed": row["seed"], **side}


def call_through(
    monkeypatch: pytest.MonkeyPatch,
    denoise: Callable[[Callable[[], Any], int], Any],
    finish: Callable[[Callable[[], Any]], Any],
) -> None:
    """Let both halves of every call pass through these: each is given what does the work; ``denoise`` also how many."""
    real_denoise, real_finish = Pipeline.denoise, Pipeline.finish

    def denoised(self: Any, orders: Any, **rest: Any) -> Any:
        return denoise(lambda: real_denoise(self, orders, **rest), len(orders))

    def finished(self: Any, made: Any) -> Any:
        return finish(lambda: real_finish(self, made))

    monkeypatch.setattr(Pipeline, "denoise", denoised)
    monkeypatch.setattr(Pipeline, "finish", finished)


def test_a_call_is_denoised_while_the_one_before_is_decoded_and_no_more_than_that(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_overlap(job, monkeypatch)
    second, events = threading.Event(), list[str]()

    def denoise(work: Callable[[], Any], count: int) -> Any:
        made = work()
        events.append("denoised")
        if events.count("denoised") == 2:
            second.set()
        assert events.count("denoised") - events.count("finished") <= 2
        return made

    def finish(work: Callable[[], Any]) -> Any:
        assert second.wait(30), "the second call waited for the first one's decoding"
        portraits = work()
        events.append("finished")
        return portraits

    call_through(monkeypatch, denoise, finish)
    assert render(job, some_rows(job, 4), tmp_path / "out", batch_size=1).rendered == 4
    assert events[:3] == ["denoised", "denoised", "finished"] and events.count("finished") == 4


def test_a_call_that_does_not_fit_beside_a_decoding_is_made_again_whole_after_it(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_overlap(job, monkeypatch)
    scarce, calls = threading.Event(), list[int]()

    def denoise(work: Callable[[], Any], count: int) -> Any:
        calls.append(count)
        if len(calls) == 2:
            threading.Timer(0.1, scarce.set).start()
            raise idgen.OutOfMemory("both at once are too much")
        return work()

    def finish(work: Callable[[], Any]) -> Any:
        assert scarce.wait(30)
        return work()

    call_through(monkeypatch, denoise, finish)
    assert render(job, some_rows(job, 4), tmp_path / "out", batch_size=2).rendered == 4
    assert calls == [2, 2, 2]


def test_a_call_that_fails_keeps_the_outcome_of_the_one_that_is_still_decoded(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_overlap(job, monkeypatch)
    failed, calls = threading.Event(), list[int]()

    def denoise(work: Callable[[], Any], count: int) -> Any:
        calls.append(count)
        if len(calls) == 2:
            threading.Timer(0.1, failed.set).start()
            raise RuntimeError("the UNet is ill")
        return work()

    def finish(work: Callable[[], Any]) -> Any:
        assert failed.wait(30)
        return work()

    call_through(monkeypatch, denoise, finish)
    assert render(job, some_rows(job, 2), tmp_path / "out", batch_size=1).rendered == 1
    assert sorted(record["status"] for record in records(tmp_path / "out")) == ["done", "failed"]


def test_pictures_are_encoded_and_written_on_another_thread(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set[str]()
    encode = idgen.Portrait.to_bytes

    def note(self: Any, suffix: str) -> bytes:
        threads.add(threading.current_thread().name)
        return encode(self, suffix)

    monkeypatch.setattr(idgen.Portrait, "to_bytes", note)
    render(job, some_rows(job, 2), tmp_path / "out")
    assert threads == {"idgen-batch-writer"}
