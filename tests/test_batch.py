"""Batch rendering: what must hold whatever happens to a row, a disk or a run."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import idgen
from idgen.batch import render as render_module
from idgen.batch import runner, storage
from idgen.batch.plan import Plan, Unit
from idgen.batch.results import Outcome
from idgen.batch.rows import Row, read_rows
from idgen.batch.writer import Writer
from idgen.pipeline import Pipeline
from tests import models

FAST = {"pipeline": models.PIPELINE, "size": "32x32", "steps": 1, "guidance": 1.0}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos and the face pack."""
    folder = tmp_path_factory.mktemp("job")
    models.photos(folder / "photos")
    return folder


def render(job: Path, rows: Any, out: Path, **settings: Any) -> Any:
    defaults = {**FAST, **settings.pop("defaults", {})}
    return idgen.render_batch(rows, out, defaults=defaults, **{**models.settings(job), **settings})


def some_rows(job: Path, count: int, **fields: Any) -> list[dict[str, Any]]:
    people = [str(path) for name, path in models.photos(job / "photos").items() if name != "nobody"]
    return [{"photo": people[k % 3], "prompt": f"p{k % 2}", "seed": k, **fields} for k in range(count)]


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), np.int16)


def test_of_200_rows_with_20_bad_ones_180_are_rendered_and_20_reported_with_line_and_cure(
    job: Path, tmp_path: Path
) -> None:
    bad = {
        "missing": ("photo: photos/gone.png", "there is no such file"),
        "faceless": ("photo: photos/nobody.png", "face"),
        "pipeline": ("photo: photos/cyan.png, pipeline: ip-adapter-faceid-plusv3", "Did you mean"),
        "size": ("photo: photos/cyan.png, width: -64", "greater than or equal to 16"),
        "broken": ('photo: "photos/cyan.png', "not YAML"),
    }
    lines, expected = ["# line 1 is a comment\n"], {}
    for k in range(200):
        kind = list(bad)[k // 10 % 5] if k % 10 == 3 else None
        fields = bad[kind][0] if kind else f"photo: photos/{['cyan', 'magenta'][k % 2]}.png"
        lines.append(f"- {{prompt: number {k % 3}, seed: {k}, {fields}}}\n")
        if kind:
            expected[len(lines)] = bad[kind][1]
    file = job / "200.yaml"
    file.write_text("".join(lines))
    summary = render(job, file, tmp_path / "out")
    assert (summary.rows, summary.rendered, summary.failed) == (200, 180, 20)
    found = records(tmp_path / "out")
    assert len(found) == 200 and [r["row"] for r in found] == list(range(1, 201))
    failed = {r["line"]: r["error"] for r in found if r["status"] == "failed"}
    assert set(failed) == set(expected)
    for line, said in expected.items():
        assert said in failed[line], (line, failed[line])
    assert len(list((tmp_path / "out").glob("*.png"))) == 180
    page = (tmp_path / "out/index.html").read_text()
    assert page.count("<figure") == 180 and "20 failed" in page
    dry: list[Any] = []
    report = render(job, file, tmp_path / "none", dry_run=True, on_problem=dry.append)
    assert {problem.line for problem in dry} == set(expected), "a dry run finds what is wrong before a night is lost"
    assert report.failed == 20 and not (tmp_path / "none").exists()


def test_the_same_command_again_renders_only_what_is_missing_or_changed(job: Path, tmp_path: Path) -> None:
    out, photo = tmp_path / "out", tmp_path / "changing.png"
    Image.open(job / "photos/cyan.png").save(photo)
    rows = [*some_rows(job, 5), {"photo": str(photo), "prompt": "p", "seed": 1}]
    assert render(job, rows, out).rendered == 6
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    again = render(job, rows, out)
    assert (again.rendered, again.kept) == (0, 6)

    rows[1]["prompt"] = "another"
    files = sorted(before)
    (out / files[3]).unlink()
    Image.open(job / "photos/magenta.png").save(photo)  # another photo under the same name, with the time of before
    os.utime(photo, (1, 1))
    again = render(job, rows, out)
    assert (again.rendered, again.kept) == (3, 3)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert [name for name in files if after[name] != before[name]] == [files[1], files[3], files[5]]
    assert len(records(out)) == 6
    assert render(job, rows, out, defaults={"steps": 2}).kept == 0, "other defaults are other requests"


def test_rows_of_unlike_size_prompt_and_person_come_out_as_if_each_were_alone(job: Path, tmp_path: Path) -> None:
    long = "a very long prompt, " * 40  # more chunks of text than the others, which must not be filled up to it
    rows = some_rows(job, 6, steps=3, guidance=4.0, negative="blurry")
    rows[2]["prompt"], rows[4]["size"] = long, "48x32"
    rows[5]["identity_scale"] = 0.3
    render(job, rows, tmp_path / "together", batch_size=8)
    worst = 0
    for row, record in zip(rows, records(tmp_path / "together")):
        alone = idgen.load(models.PIPELINE, **models.settings(job))
        fields = {"steps": 3, "guidance": 4.0, "negative_prompt": "blurry", "seed": row["seed"], "height": 32}
        fields |= {"width": 48} if "size" in row else {"width": 32}
        fields |= {"identity_scale": 0.3} if "identity_scale" in row else {}
        one = np.asarray(alone.generate(row["photo"], row["prompt"], **fields)[0].image, np.int16)
        other = pixels(tmp_path / "together" / record["file"])
        assert one.shape == other.shape
        worst = max(worst, int(np.abs(one - other).max()))
    assert worst <= 1, f"{worst} levels of 255"


def test_n_images_of_a_row_have_the_seeds_that_make_them_alone(job: Path, tmp_path: Path) -> None:
    render(job, some_rows(job, 1, n=3, seed=40), tmp_path / "many")
    assert [record["seed"] for record in records(tmp_path / "many")] == [40, 41, 42]
    render(job, some_rows(job, 1, seed=42), tmp_path / "one")
    name = records(tmp_path / "one")[0]["file"]
    assert np.abs(pixels(tmp_path / "one" / name) - pixels(tmp_path / "many" / name)).max() <= 1


def test_rows_without_a_seed_get_their_own_and_keep_it(job: Path, tmp_path: Path) -> None:
    row = {"photo": str(job / "photos/cyan.png"), "prompt": "p"}
    render(job, [row, row], tmp_path / "out")
    seeds = [record["seed"] for record in records(tmp_path / "out")]
    assert seeds[0] != seeds[1], "two equal rows are two pictures"
    assert render(job, [row, row], tmp_path / "out").kept == 2


def test_each_person_is_looked_at_once_and_models_are_loaded_once(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, loaded, calls = list[Any](), list[str](), list[int]()
    from_photos, load, many = idgen.Identity.from_photos, idgen.api.load, Pipeline.denoise  # type: ignore[attr-defined]

    def count_people(photos: Any, *rest: Any, **more: Any) -> Any:
        looked.append(photos)
        return from_photos(photos, *rest, **more)

    def count_loads(name: str, **settings: Any) -> Any:
        loaded.append(name)
        return load(name, **settings)

    def count_calls(self: Any, requests: Any, **rest: Any) -> Any:
        calls.append(len(requests))
        return many(self, requests, **rest)

    monkeypatch.setattr(idgen.Identity, "from_photos", count_people)
    monkeypatch.setattr("idgen.api.load", count_loads)
    monkeypatch.setattr(Pipeline, "denoise", count_calls)
    rows = [*some_rows(job, 10), *some_rows(job, 3, pipeline="text-to-image"), *some_rows(job, 3)]
    for row in rows[13:]:
        row["seed"] += 100
    render(job, rows, tmp_path / "out", batch_size=4)
    assert len(looked) == 3
    assert sorted(loaded) == [models.PIPELINE, "text-to-image"]
    assert sorted(calls) == [1, 3, 4, 4, 4]


def test_out_of_memory_halves_the_batch_and_goes_on(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many, calls = Pipeline.denoise, list[int]()

    def scarce(self: Any, requests: Any, **rest: Any) -> Any:
        calls.append(len(requests))
        if len(requests) > 2:
            raise idgen.OutOfMemory("the GPU ran out of memory")
        return many(self, requests, **rest)

    monkeypatch.setattr(Pipeline, "denoise", scarce)
    summary = render(job, some_rows(job, 12), tmp_path / "out", batch_size=8)
    assert (summary.rendered, summary.failed) == (12, 0)
    assert max(calls[3:]) <= 2, f"after the halving no call is too large again: {calls}"


def test_memory_that_is_short_for_a_single_image_fails_that_row_with_the_cure(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Pipeline.denoise

    def scarce(self: Any, requests: Any, **rest: Any) -> Any:
        if any(order.width > 32 for order in requests):
            raise idgen.OutOfMemory("the GPU ran out of memory: lower width or height")
        return many(self, requests, **rest)

    monkeypatch.setattr(Pipeline, "denoise", scarce)
    rows = some_rows(job, 4)
    rows[1]["size"] = "64x64"
    summary = render(job, rows, tmp_path / "out")
    assert (summary.rendered, summary.failed) == (3, 1)
    assert "lower width" in records(tmp_path / "out")[1]["error"]


def test_an_unforeseen_error_in_one_row_harms_no_other_of_its_batch(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Pipeline.denoise

    def moody(self: Any, requests: Any, **rest: Any) -> Any:
        if any(order.seeds == (2,) for order in requests):
            raise RuntimeError("CUBLAS_STATUS_INTERNAL_ERROR")
        return many(self, requests, **rest)

    monkeypatch.setattr(Pipeline, "denoise", moody)
    summary = render(job, some_rows(job, 6), tmp_path / "out")
    assert (summary.rendered, summary.failed) == (5, 1)
    monkeypatch.setattr(Pipeline, "denoise", many)
    assert render(job, some_rows(job, 6), tmp_path / "out").rendered == 1, "what failed is tried again"


def test_a_sick_machine_stops_the_run_instead_of_failing_every_row(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int]()

    def broken(self: Any, requests: Any, **rest: Any) -> Any:
        calls.append(1)
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(Pipeline, "denoise", broken)
    with pytest.raises(idgen.IdgenError, match="not the rows' fault"):
        render(job, some_rows(job, 100), tmp_path / "out", batch_size=1)
    assert len(calls) < 30


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


def test_a_call_is_denoised_while_the_one_before_is_decoded_and_no_more_than_that(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_overlap(job, monkeypatch)
    denoise, finish = Pipeline.denoise, Pipeline.finish
    second, events = threading.Event(), list[str]()

    def denoised(self: Any, orders: Any, **rest: Any) -> Any:
        made = denoise(self, orders, **rest)
        events.append("denoised")
        if events.count("denoised") == 2:
            second.set()
        assert events.count("denoised") - events.count("finished") <= 2
        return made

    def finished(self: Any, made: Any) -> Any:
        assert second.wait(30), "the second call waited for the first one's decoding"
        portraits = finish(self, made)
        events.append("finished")
        return portraits

    monkeypatch.setattr(Pipeline, "denoise", denoised)
    monkeypatch.setattr(Pipeline, "finish", finished)
    assert render(job, some_rows(job, 4), tmp_path / "out", batch_size=1).rendered == 4
    assert events[:3] == ["denoised", "denoised", "finished"] and events.count("finished") == 4


def test_a_call_that_does_not_fit_beside_a_decoding_is_made_again_whole_after_it(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_overlap(job, monkeypatch)
    denoise, finish = Pipeline.denoise, Pipeline.finish
    scarce, calls = threading.Event(), list[int]()

    def denoised(self: Any, orders: Any, **rest: Any) -> Any:
        calls.append(len(orders))
        if len(calls) == 2:
            threading.Timer(0.1, scarce.set).start()
            raise idgen.OutOfMemory("both at once are too much")
        return denoise(self, orders, **rest)

    def finished(self: Any, made: Any) -> Any:
        assert scarce.wait(30)
        return finish(self, made)

    monkeypatch.setattr(Pipeline, "denoise", denoised)
    monkeypatch.setattr(Pipeline, "finish", finished)
    assert render(job, some_rows(job, 4), tmp_path / "out", batch_size=2).rendered == 4
    assert calls == [2, 2, 2]


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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", ""),
        ("a.txt", "# only words\n\n"),
        ("a.csv", "photo,prompt\n"),
        ("a.jsonl", "\n"),
        ("a.yaml", "defaults: {steps: 3}\nrows:\n"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_prompt_file_without_rows_is_an_error_that_names_it(
    job: Path, tmp_path: Path, name: str, text: str, dry_run: bool
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(idgen.BadRequest, match=f"{name} has no rows"):
        render(job, tmp_path / name, tmp_path / "out", dry_run=dry_run)
    assert not (tmp_path / "out").exists()
    assert render(job, [], tmp_path / "out", dry_run=dry_run).rows == 0, "from code an empty list is no mistake"


def test_strict_stops_before_anything_is_rendered_and_names_the_line(job: Path, tmp_path: Path) -> None:
    rows = some_rows(job, 3)
    rows[1]["width"] = 33
    with pytest.raises(idgen.BadRequest, match="line 2: width: must be a multiple of 8"):
        render(job, rows, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()
    rows = [*some_rows(job, 1), {"photo": str(job / "photos/nobody.png"), "prompt": "p", "seed": 1}]
    with pytest.raises(idgen.BadRequest, match=r"line 2: .*face"):
        render(job, rows, tmp_path / "out", strict=True)


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


def test_rows_taken_out_of_the_file_leave_the_results_but_never_the_folder(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    render(job, some_rows(job, 3), out)
    render(job, some_rows(job, 2), out)
    assert len(records(out)) == 2 and len(list(out.glob("*.png"))) == 3


def test_a_name_that_two_rows_would_share_is_refused_for_the_second(job: Path, tmp_path: Path) -> None:
    summary = render(job, some_rows(job, 4), tmp_path / "out", name="{person}.png")
    assert summary.failed == 1 and "overwrite an image of line 1" in summary.problems[0].message
    named = render(job, some_rows(job, 3), tmp_path / "ids", name="{person}/{id}.webp")
    assert named.rendered == 3 and len(list((tmp_path / "ids/cyan").glob("*.webp"))) == 1


def test_a_plan_of_many_rows_takes_no_more_memory_than_one_of_few(job: Path, tmp_path: Path) -> None:
    def peak(count: int) -> int:
        file = tmp_path / f"{count}.jsonl"
        row = {"photo": str(job / "photos/cyan.png"), "prompt": "x" * 200, "pipeline": models.PIPELINE}
        file.write_text("".join(json.dumps({**row, "seed": k}) + "\n" for k in range(count)))
        plan = Plan("{row}.png", str(tmp_path), {})
        tracemalloc.start()
        for each in read_rows(file, {}, {}):
            assert plan.add(each) is None
        assert sum(len(window) for window in plan.windows(64)) == count
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    peak(50)  # imports
    assert peak(4000) < peak(400) + 300_000


def test_groups_follow_each_other_and_the_larger_of_people_and_prompts_comes_in_order(job: Path) -> None:
    plan = Plan("{row}.png", str(job), {})
    for k in range(24):
        fields = {"pipeline": ["text-to-image", "ip-adapter"][k % 2], "prompt": f"{k % 12}", "seed": k, "steps": 1}
        assert plan.add(Row(k + 1, k + 1, fields)) is None
    windows = list(plan.windows(5))
    assert [len(window) for window in windows] == [5, 5, 2, 5, 5, 2]
    assert all(len({unit.pipeline for unit in window}) == 1 for window in windows)
    plan.mark_done(1, 0)
    assert sum(map(len, plan.windows(5))) == 23 == plan.count("pending")


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


def test_saved_identities_take_the_place_of_photos(job: Path, tmp_path: Path) -> None:
    from idgen.faces import FaceExtractor

    extractor = FaceExtractor(Path(models.settings(job)["faces"]), device="cpu")
    idgen.Identity.from_photos(job / "photos/cyan.png", extractor).save(tmp_path / "cy.safetensors")
    rows = [{"identity": str(tmp_path / "cy.safetensors"), "prompt": "p", "seed": 1}]
    render(job, [*rows, {"photo": str(job / "photos/cyan.png"), "prompt": "p", "seed": 1}], tmp_path / "out")
    one, other = (pixels(tmp_path / "out" / record["file"]) for record in records(tmp_path / "out"))
    assert np.array_equal(one, other)


def test_a_first_signal_finishes_the_images_in_hand_a_second_interrupts(caplog: pytest.LogCaptureFixture) -> None:
    import signal

    # Not always Python's own: whoever starts the tests in the background may have it ignored.
    before = signal.getsignal(signal.SIGINT)
    with runner.stoppable() as stopped, caplog.at_level(logging.WARNING):
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped() and "after the images in hand" in caplog.text
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_while_the_rows_are_read_stops_before_anything_is_rendered(job: Path, tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        one, two = some_rows(job, 2)
        yield one
        signal.raise_signal(signal.SIGINT)
        yield two

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(idgen.Cancelled, match="nothing was rendered"):
        render(job, rows(), tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is before and not (tmp_path / "out").exists()


def test_an_interrupt_at_any_moment_is_one_line_and_exit_code_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from idgen.cli import main

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("idgen.batch.render_batch", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["batch", "rows.txt", "--out", str(tmp_path)])
    assert ended.value.code == 130 and capsys.readouterr().err == "idgen: interrupted.\n"


def test_weights_that_are_missing_fail_their_rows_with_the_command_that_gets_them(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[str]()

    def missing(name: str, **settings: Any) -> Any:
        tried.append(name)
        raise idgen.WeightsMissing("get it with: idgen weights pull instantid")

    monkeypatch.setattr("idgen.api.load", missing)
    summary = render(job, some_rows(job, 3), tmp_path / "out")
    assert summary.failed == 3 and len(tried) == 1, "not tried anew for every row"
    assert all("idgen weights pull" in record["error"] for record in records(tmp_path / "out"))


def test_the_renderer_forgets_the_people_it_has_not_seen_for_long(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_module, "PEOPLE", 2)
    assert render(job, some_rows(job, 9), tmp_path / "out", batch_size=2).rendered == 9


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
