"""A batch that is killed loses nothing: real processes, killed with SIGKILL at random moments, then resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import idgen
from tests import batch_process, models
from tests.batches import records
from tests.serving import wait_until

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL: run it on Linux or macOS"
)

ROWS = 48


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt file of 48 rows and what it refers to."""
    folder = tmp_path_factory.mktemp("job")
    people = list(models.photos(folder / "photos"))[:3]
    rows = [
        {"photo": f"photos/{people[k % 3]}.png", "prompt": f"portrait {k % 4}", "seed": k, "pipeline": models.PIPELINE}
        for k in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps({**row, **models.SMALL}) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(job: Path) -> Path:
    out = job / "uninterrupted"
    idgen.render_batch(job / "rows.jsonl", out, batch_size=2, **models.settings(job))
    return out


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([batch_process.__name__])
    yield server


def start(context: Any, job: Path, out: Path, hold: Path | None = None) -> BaseProcess:
    arguments = ["batch", str(job / "rows.jsonl"), "--out", str(out), "--batch-size", "2", *models.options(job)]
    child = context.Process(target=batch_process.main, args=(arguments, str(job / "log.txt"), hold and str(hold)))
    child.start()
    return child


def recorded(out: Path) -> int:
    log = out / "results.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_more(child: BaseProcess, out: Path, before: int) -> None:
    while child.is_alive() and recorded(out) <= before:
        time.sleep(0.002)


def assert_same_as(uninterrupted: Path, out: Path) -> None:
    """Every row once, in order, each image whole and equal to the uninterrupted run's to rounding."""
    ours, theirs = records(out), records(uninterrupted)
    assert [(r["row"], r["status"], r["file"]) for r in ours] == [(r["row"], r["status"], r["file"]) for r in theirs]
    assert len(ours) == ROWS
    for record in ours:
        pictures = [np.asarray(Image.open(folder / record["file"]), np.int16) for folder in (out, uninterrupted)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1, record["file"]
    assert {p.name for p in out.glob("*.png")} == {r["file"] for r in ours}
    assert not list(out.rglob(".idgen-part-*"))


def test_twenty_kills_at_random_moments_lose_no_row_and_leave_no_half_written_image(
    context: Any, job: Path, uninterrupted: Path
) -> None:
    out, chance, killed_while_rendering = job / "killed", random.Random(5), 0
    for moment in range(20):
        if recorded(out) >= ROWS:  # a quick machine is done between two kills: what it made must be right; then anew
            assert_same_as(uninterrupted, out)
            shutil.rmtree(out)
        child, before = start(context, job, out), recorded(out)
        if moment % 4:  # three in four while images are being made and written, the others at the beginning
            wait_for_more(child, out, before)
            time.sleep(chance.uniform(0, 0.15))
        else:
            time.sleep(chance.uniform(0, 1.5))
        if child.is_alive() and recorded(out) > before:
            killed_while_rendering += 1
        with suppress(ProcessLookupError):  # it may have finished by itself
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        for record in records_so_far(out):
            with Image.open(out / record["file"]) as image:
                image.load()  # whatever is recorded is there, whole
        assert recorded(out) >= before, "a recorded result was lost"
        for picture in out.glob("*.png"):
            with Image.open(picture) as image:
                image.load()
    assert killed_while_rendering >= 8
    child = start(context, job, out)
    child.join(200)
    assert child.exitcode == 0, (job / "log.txt").read_text()
    assert_same_as(uninterrupted, out)


def records_so_far(out: Path) -> list[dict[str, Any]]:
    """Complete lines; a last one without its end is torn."""
    log = out / "results.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return [json.loads(line) for line in lines]


def test_ctrl_c_finishes_the_image_in_hand_and_the_same_command_goes_on(
    context: Any, job: Path, uninterrupted: Path
) -> None:
    out, hold = job / "interrupted", job / "hold"
    hold.touch()
    child = start(context, job, out, hold)  # held, it cannot be done before it is interrupted
    wait_for_more(child, out, 0)
    os.kill(child.pid, signal.SIGINT)
    wait_until(lambda: "stopping after the images in hand" in (job / "log.txt").read_text(), 60)
    hold.unlink()
    child.join(60)
    said = (job / "log.txt").read_text()
    assert child.exitcode == 130 and "The same command goes on" in said
    finished = {record["file"] for record in records(out)}
    assert 0 < len(finished) < ROWS
    assert {p.name for p in out.glob("*.png")} == finished, "an image without its record, or a record without its image"
    assert (out / "index.html").is_file()
    times = {file: (out / file).stat().st_mtime_ns for file in finished}
    child = start(context, job, out)
    child.join(200)
    assert child.exitcode == 0, (job / "log.txt").read_text()
    assert {file: (out / file).stat().st_mtime_ns for file in finished} == times, "a finished image was made again"
    assert_same_as(uninterrupted, out)
