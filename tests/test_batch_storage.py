"""Where a batch writes: full disks, torn lines, two runs in one folder, and buckets."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import idgen
from idgen.batch import runner, storage
from idgen.batch.plan import Plan, Unit
from idgen.batch.results import Outcome
from idgen.batch.writer import Writer
from tests.batches import job_folder, pixels, records, render, some_rows


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job_folder(tmp_path_factory)


@pytest.mark.parametrize("sync", range(2, 9))
def test_a_full_disk_stops_cleanly_and_the_next_run_goes_on(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: int
) -> None:
    """The disk is full from the n-th write on, be it of an image or of the results."""
    real, count = os.fsync, list[int]()

    def full(descriptor: int) -> None:
        count.append(1)
        if len(count) >= sync:
            os.write(descriptor, b"") if sync % 2 else None
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(storage.os, "fsync", full)
    out = tmp_path / "out"
    with pytest.raises(storage.DiskFull, match="free some space and run the same command again"):
        render(job, some_rows(job, 6), out, batch_size=1)
    monkeypatch.setattr(storage.os, "fsync", real)
    for record in records(out) if (out / "results.jsonl").exists() else []:
        pixels(out / record["file"])
    assert not list(out.rglob(".idgen-part-*"))
    summary = render(job, some_rows(job, 6), out)
    assert summary.rendered + summary.kept == 6 and len(records(out)) == 6


def test_a_record_that_the_disk_takes_only_half_of_leaves_the_results_as_they_were(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="this system has no limits on files: run it on Linux or macOS")
    folder = storage.open_folder(tmp_path)
    folder.append([b'{"row": 1}'])
    before, limits = (tmp_path / "results.jsonl").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (len(before) + 6, limits[1])
    )  # the system then writes six bytes and stops
    try:
        with pytest.raises(storage.DiskFull):
            folder.append([b'{"row": 2, "image": 0}'])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "results.jsonl").read_bytes() == before
    folder.close()


def test_pictures_written_before_the_disk_was_full_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = storage.LocalFolder(tmp_path)
    write, durable = storage.LocalFolder.write, list[str]()

    def full(self: Any, file: str, data: bytes) -> None:
        if file == "2.png":
            raise storage.DiskFull("full")
        write(self, file, data)

    monkeypatch.setattr(storage.LocalFolder, "write", full)
    writer = Writer(folder, lambda outcome: durable.append(outcome.unit.file))
    for row in range(4):  # all wait before the writer starts, so that it takes them together
        writer.put(Outcome(Unit(row, 0, row, "ada", "p", row, {}, f"{row}.png", "f"), 0.1, data=b"picture"))
    with writer:
        pass
    assert isinstance(writer.error, storage.DiskFull)
    assert [record["file"] for record in records(tmp_path)] == durable == ["0.png", "1.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == durable
    folder.close()


def test_a_full_folder_for_temporary_files_is_named(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Plan):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.db.execute("PRAGMA max_page_count = 40")

    monkeypatch.setattr(runner, "Plan", Full)
    with pytest.raises(storage.DiskFull, match="SQLITE_TMPDIR"):
        render(job, some_rows(job, 500), tmp_path / "out", dry_run=True)


def test_two_runs_never_write_to_one_folder_at_once(job: Path, tmp_path: Path) -> None:
    folder = storage.open_folder(tmp_path)
    with pytest.raises(idgen.BadRequest, match="another batch is writing"):
        render(job, some_rows(job, 1), tmp_path)
    folder.close()
    assert render(job, some_rows(job, 1), tmp_path).rendered == 1


def test_a_torn_last_line_is_dropped_and_its_image_made_again(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    render(job, some_rows(job, 3), out)
    log = out / "results.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    (out / ".idgen-part-left").write_bytes(b"half a picture")
    summary = render(job, some_rows(job, 3), out)
    assert (summary.rendered, summary.kept) == (1, 2) and len(records(out)) == 3
    assert not (out / ".idgen-part-left").exists()


@pytest.mark.parametrize("where", ["here", "bucket"])
def test_an_image_without_a_byte_is_made_again(job: Path, tmp_path: Path, where: str) -> None:
    import fsspec

    out = str(tmp_path / "out") if where == "here" else "memory://bucket/empty"
    render(job, some_rows(job, 2), out)
    fs, root = fsspec.core.url_to_fs(out)
    image = sorted(path for path in fs.find(root) if path.endswith(".png"))[0]
    fs.pipe_file(image, b"")
    again = render(job, some_rows(job, 2), out)
    assert (again.rendered, again.kept) == (1, 1) and fs.size(image) > 100


def test_a_record_is_on_the_disk_before_anybody_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real, synced = storage.LocalFolder(tmp_path), os.fsync, list[tuple[int, int]]()

    def note(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        real(descriptor)

    monkeypatch.setattr(storage.os, "fsync", note)
    folder.append([b'{"row": 1}'])
    assert synced == [((tmp_path / "results.jsonl").stat().st_ino, 11)]
    folder.close()


def test_names_that_differ_in_capitals_only_are_one_name(job: Path, tmp_path: Path) -> None:
    """On many disks the second would overwrite the first."""
    rows = [{**row, "person": person} for row, person in zip(some_rows(job, 2), ("Ada", "ada"))]
    summary = render(job, rows, tmp_path / "out", name="{person}.png", dry_run=True)
    assert summary.failed == 1 and "overwrite an image of line 1" in summary.problems[0].message


def test_rows_taken_out_of_the_file_leave_the_results_but_never_the_folder(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    render(job, some_rows(job, 3), out)
    render(job, some_rows(job, 2), out)
    assert len(records(out)) == 2 and len(list(out.glob("*.png"))) == 3


def test_results_in_a_bucket_survive_without_appending(job: Path) -> None:
    import fsspec

    url = "memory://bucket/night"
    assert render(job, some_rows(job, 3), url, batch_size=1).rendered == 3  # type: ignore[arg-type]
    fs = fsspec.filesystem("memory")
    assert len(fs.cat_file("/bucket/night/results.jsonl").splitlines()) == 3
    assert not fs.find("/bucket/night/results")
    folder = storage.open_folder(url)
    folder.append([b'{"row": 9, "image": 0}'])  # as a run that was killed leaves it
    again = render(job, some_rows(job, 4), url)  # type: ignore[arg-type]
    assert (again.rendered, again.kept) == (1, 3)
    assert len(fs.cat_file("/bucket/night/results.jsonl").splitlines()) == 4


def test_photos_and_prompt_file_may_lie_in_a_bucket(job: Path, tmp_path: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/in/photos/cyan.png", (job / "photos/cyan.png").read_bytes())
    fs.pipe_file("/in/rows.csv", b"photo,prompt,seed\nphotos/cyan.png,p,3\nphotos/gone.png,p,4\n")
    summary = render(job, "memory://in/rows.csv", tmp_path / "out")
    assert (summary.rendered, summary.failed) == (1, 1) and "no such file" in summary.problems[0].message
    local = render(job, [{"photo": str(job / "photos/cyan.png"), "prompt": "p", "seed": 3}], tmp_path / "local")
    assert local.rendered == 1
    name = records(tmp_path / "local")[0]["file"]
    assert np.array_equal(pixels(tmp_path / "local" / name), pixels(tmp_path / "out" / name))
