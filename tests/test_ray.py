"""Batch rendering on a real local Ray cluster of two workers."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

import idgen
from tests import models
from tests.batches import records

ray = pytest.importorskip(
    "ray", reason="Ray is not installed: pip install 'idgen[cluster]', on a Python that Ray has a wheel for"
)
ROWS = 16


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray.init(
        num_cpus=2,
        num_gpus=0,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    people = list(models.photos(folder / "photos"))[:3]
    rows: list[dict[str, Any]] = [
        {"photo": f"photos/{people[k % 3]}.png", "prompt": f"portrait {k % 3}", "seed": k} for k in range(ROWS)
    ]
    rows[4]["photo"] = "photos/missing.png"
    rows[9]["photo"] = "photos/nobody.png"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def render(job: Path, out: Any, **settings: Any) -> Any:
    defaults = {"pipeline": models.PIPELINE, "size": "32x32", "steps": 1, "guidance": 1.0}
    return idgen.render_batch(
        job / "rows.jsonl", out, defaults=defaults, batch_size=2, **models.settings(job), **settings
    )


@pytest.fixture(scope="module")
def alone(job: Path) -> Path:
    """The same job on one machine."""
    render(job, job / "alone")
    return job / "alone"


def assert_same(out: Path, alone: Path) -> None:
    ours, theirs = records(out), records(alone)
    assert [(r["row"], r["status"], r["file"], r["error"]) for r in ours] == [
        (r["row"], r["status"], r["file"], r["error"]) for r in theirs
    ]
    done = [r for r in ours if r["status"] == "done"]
    assert len(ours) == ROWS and len(done) == ROWS - 2
    for record in done:
        pictures = [np.asarray(Image.open(folder / record["file"]), np.int16) for folder in (out, alone)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1, record["file"]


def workers() -> list[psutil.Process]:
    """The processes of this cluster's actors that render."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_worker_costs_no_row_and_none_comes_twice(cluster: Any, job: Path, alone: Path) -> None:
    out, killed = job / "ray", list[int]()

    def kill_one() -> None:
        log = out / "results.jsonl"
        while not log.exists() or log.read_bytes().count(b'"done"') < 3:
            time.sleep(0.02)
        victim = workers()[0]
        os.kill(victim.pid, signal.SIGKILL)
        killed.append(victim.pid)

    assassin = threading.Thread(target=kill_one, daemon=True)
    assassin.start()
    summary = render(job, out, ray="auto", workers=2)
    assassin.join(5)
    assert killed, "the job ended before a worker could be killed"
    assert summary.rendered == ROWS - 2 and summary.failed == 2
    assert_same(out, alone)


def test_a_job_begun_alone_is_finished_on_the_cluster_and_what_is_done_stays(
    cluster: Any, job: Path, alone: Path
) -> None:
    out = job / "moved"
    rows = (job / "rows.jsonl").read_text().splitlines(keepends=True)
    (job / "some.jsonl").write_text("".join(rows[:8]))
    defaults = {"pipeline": models.PIPELINE, "size": "32x32", "steps": 1, "guidance": 1.0}
    idgen.render_batch(job / "some.jsonl", out, defaults=defaults, batch_size=2, **models.settings(job))
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.png")}
    summary = render(job, out, ray="auto", workers=1)
    assert summary.kept == len(before) == 7 and summary.rendered == ROWS - 9
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert_same(out, alone)


def test_workers_write_to_a_bucket_themselves_and_a_second_run_finds_all_done(
    cluster: Any, job: Path, alone: Path, tmp_path: Path
) -> None:
    url = f"local://{tmp_path}/bucket"  # fsspec's own name for a folder: the way of s3:// and gs:// without a server
    assert render(job, url, ray="auto", workers=1).rendered == ROWS - 2
    assert_same(tmp_path / "bucket", alone)
    assert not list((tmp_path / "bucket/results").iterdir()), "records were left ungathered"
    again = render(job, url)
    assert (again.rendered, again.kept) == (0, ROWS - 2)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_without_a_cluster_the_message_says_at_once_how_to_start_one(address: str) -> None:
    from idgen import cluster

    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(idgen.BadRequest, match="ray start --head"):
        cluster._connect(address)
