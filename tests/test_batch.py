"""Batch rendering: what must hold whatever happens to a row or a run."""

from __future__ import annotations

import gc
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import idgen
from idgen import api
from idgen.backbone import Backbone
from idgen.batch import render as render_module
from idgen.batch.plan import Plan
from idgen.batch.rows import Row, read_rows
from idgen.pipeline import Pipeline
from idgen.registry import method
from tests import models
from tests.batches import job_folder, pixels, records, render, some_rows


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job_folder(tmp_path_factory)


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


def test_pipelines_on_one_base_load_it_once_even_where_the_first_leaves_before_the_next_comes(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.unload()
    gc.collect()
    loads, load = list[str](), Backbone.load.__func__  # type: ignore[attr-defined]

    def count(cls: type[Backbone], source: Any, **settings: Any) -> Backbone:
        loads.append(str(source))
        return load(cls, source, **settings)

    monkeypatch.setattr(Backbone, "load", classmethod(count))
    names = ("text-to-image", "ip-adapter-faceid", models.PIPELINE)
    rows = [row for name in names for row in some_rows(job, 1, pipeline=name)]
    assert render(job, rows, tmp_path / "out", vae_slicing=True).rendered == 3
    assert len(loads) == 1


def test_a_method_that_reads_each_photo_reads_them_again_for_the_persons_next_row(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method("ip-adapter-faceid"), "each_photo", True)
    photos = [str(path) for name, path in models.photos(job / "photos").items() if name != "nobody"][:2]
    fields = {"pipeline": "instantid+ip-adapter-faceid", "photo": photos, "prompt": "p"}
    monkeypatch.setattr("idgen.identity.combine", lambda faces, names: (faces[0].embedding, faces[0]))
    render(job, [{**fields, "seed": seed} for seed in (1, 2)], tmp_path / "both", batch_size=1)
    render(job, [{**fields, "seed": 2}], tmp_path / "one")
    both, one = (records(tmp_path / name) for name in ("both", "one"))
    assert [record["status"] for record in [*both, *one]] == ["done"] * 3, both
    assert np.array_equal(pixels(tmp_path / "both" / both[1]["file"]), pixels(tmp_path / "one" / one[0]["file"]))


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


def test_saved_identities_take_the_place_of_photos(job: Path, tmp_path: Path) -> None:
    from idgen.faces import FaceExtractor

    extractor = FaceExtractor(Path(models.settings(job)["faces"]), device="cpu")
    idgen.Identity.from_photos(job / "photos/cyan.png", extractor).save(tmp_path / "cy.safetensors")
    rows = [{"identity": str(tmp_path / "cy.safetensors"), "prompt": "p", "seed": 1}]
    render(job, [*rows, {"photo": str(job / "photos/cyan.png"), "prompt": "p", "seed": 1}], tmp_path / "out")
    one, other = (pixels(tmp_path / "out" / record["file"]) for record in records(tmp_path / "out"))
    assert np.array_equal(one, other)


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
