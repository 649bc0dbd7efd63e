"""Portraits: saved whole, made again bit-equal, carrying no face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import idgen
from idgen.cli import main
from idgen.errors import BadImage, BadRequest
from idgen.portrait import Portrait, read_metadata
from idgen.user_weights import recorded
from tests import tiny
from tests.test_backbone import lora_file


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDGEN_HOME", str(tmp_path / "home"))


def made(seed: int = 7, **fields: object) -> Portrait:
    return tiny.shared("instantid").generate(tiny.person(), "a man", seed=seed, **(tiny.SMALL | fields))[0]


def test_a_png_carries_the_request_and_neither_the_face_nor_a_photo(tmp_path: Path) -> None:
    path = made().save(tmp_path / "a.png")
    data = read_metadata(path)
    assert data["seed"] == 7
    assert data["request"]["prompt"] == "a man" and data["request"]["steps"] == 3
    assert data["request"]["negative_prompt"] is not None and data["request"]["guidance"] == 5.0
    assert data["versions"]["idgen"] == idgen.__version__
    assert all(len(digest) == 64 for digest in data["weights"].values())
    assert len(json.dumps(data)) < 4000, "an embedding would be far longer"


def test_the_number_of_images_seeds_each_by_itself() -> None:
    portraits = tiny.shared("instantid").generate(tiny.person(), "a man", seed=3, n=3, **tiny.SMALL)
    assert [p.seed for p in portraits] == [3, 4, 5]


def test_without_a_seed_two_runs_differ() -> None:
    one, two = made(seed=None), made(seed=None)  # type: ignore[arg-type]
    assert one.seed != two.seed


def test_like_renders_the_same_pixels_again(tmp_path: Path) -> None:
    files = ["--device", "cpu"]
    for role, path in tiny.FILES["instantid"].items():
        files += [f"--{role}", str(path)]
    who, first, again, other = (tmp_path / name for name in ("who.safetensors", "first.png", "again.png", "other.png"))
    tiny.person().save(who)
    size = ["--seed", "5", "--steps", "3", "--width", "64", "--height", "64"]
    base = ["--pipeline", "instantid", "--base", str(tiny.SDXL)]
    main_ok(["generate", str(who), "a man", *base, *size, "--out", str(first), *files])
    main_ok(["generate", "--like", str(first), "--out", str(again), *files])
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    main_ok(["generate", "--like", str(first), "--seed", "6", "--out", str(other), *files])
    assert not np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(other)))


def test_like_loads_the_users_loras_and_embeddings_again_or_says_that_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import save_file

    from idgen import api

    base = tiny.backbone()
    lora = lora_file(base, tmp_path)
    pipeline = tiny.load("instantid", base)
    bare = pipeline.generate(tiny.person(), "a man", seed=5, **tiny.SMALL)[0]
    assert bare.provenance["user_weights"] == []
    base.load_lora(lora, 0.9)
    made_with = pipeline.generate(tiny.person(), "a man", seed=5, **tiny.SMALL)[0]
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    made_with.save(first)
    monkeypatch.chdir(tmp_path.parent)  # the record holds wherever the command is given
    files = [f"--{role}={path}" for role, path in tiny.FILES["instantid"].items()]
    like = ["generate", "--like", str(first), "--out", str(again), "--device", "cpu", *files]
    api.unload()  # as a new process
    main_ok(like)
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    assert not np.array_equal(np.asarray(bare.image), np.asarray(Image.open(again)))
    again.unlink()
    moved = lora.rename(tmp_path / "moved.safetensors")
    save_file({"other": torch.zeros(1)}, lora)
    for what in ("has changed since", "is not there"):
        with pytest.raises(SystemExit) as done:
            main(like)
        said = capsys.readouterr().err
        assert done.value.code == 2 and what in said and "--lora FILE:0.9" in said and not again.exists()
        lora.unlink(missing_ok=True)
    api.unload()  # as a new process
    main_ok([*like, "--lora", f"{moved}:0.9"])
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))


def test_a_portrait_names_the_embeddings_and_hub_loras_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.backbone()
    for loader in ("load_textual_inversion", "load_lora_weights", "set_adapters"):
        monkeypatch.setattr(base.pipe, loader, lambda *_, **__: None)
    base.load_lora("owner/style", 0.5)
    base.load_embedding("owner/word", "<word>")
    names = made_by(base)["user_weights"]
    assert [(n["kind"], n["source"], n["sha256"]) for n in names] == [
        ("lora", "owner/style", None),
        ("embedding", "owner/word", None),
    ]
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(base, "load_lora", lambda *given: calls.append(given))
    monkeypatch.setattr(base, "load_embedding", lambda *given: calls.append(given))
    for weights in recorded({"user_weights": names}, "a.png"):
        weights.check("a.png")
        weights.load(base)
    assert calls == [("owner/style", 0.5), ("owner/word", "<word>")]


def made_by(base: Any) -> dict[str, Any]:
    return tiny.load("instantid", base).generate(tiny.person(), "a man", seed=5, **tiny.SMALL)[0].provenance


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code in (0, None)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_portraits_are_saved_in_the_usual_formats(suffix: str, tmp_path: Path) -> None:
    path = made().save(tmp_path / f"a{suffix}")
    assert Image.open(path).size == (64, 64)
    assert {entry.name for entry in tmp_path.iterdir()} <= {path.name, "home"}


def test_a_saved_portrait_is_as_readable_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert made().save(tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_target_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    portrait = made()
    with pytest.raises(BadRequest, match="saved as"):
        portrait.save(tmp_path / "a.tiff")
    with pytest.raises(BadRequest, match="cannot write"):
        portrait.save(tmp_path / "nowhere" / "a.png")


def test_pictures_without_our_metadata_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    for name in ("plain.png", "text.png", "nothing.png"):
        with pytest.raises(BadImage):
            read_metadata(tmp_path / name)


@pytest.mark.parametrize(
    "damage",
    [{"request": 5}, {"request": {}}, {"levers": {"unheard": 1}}, {"inputs": None}, {"seed": "7"}, {"weights": []}]
    + [
        {"user_weights": wrong}
        for wrong in (5, [5], [{"kind": "lora"}], [{"kind": "x", "source": "y", "sha256": None}])
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_rendering_again_from_damaged_metadata_is_one_clear_error(
    damage: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    portrait = made()
    if damage == {"request": {}}:
        damage = {"request": {}, "base": "/no/such/base"}
    portrait.provenance.update(damage)
    file = (Portrait(portrait.image, damage.get("seed", 1), None, None, portrait.provenance)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as done:
        main(["generate", "--like", str(file), "--out", str(tmp_path / "b.png")])
    assert done.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_portrait_of_a_version_that_recorded_no_speed_is_rendered_again_at_a_given_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    portrait = made()
    del portrait.provenance["levers"]
    like = ["generate", "--like", str(portrait.save(tmp_path / "a.png")), "--out", str(tmp_path / "b.png")]
    like += [f"--{role}={path}" for role, path in tiny.FILES["instantid"].items()]
    with pytest.raises(SystemExit) as done:
        main(like)
    assert done.value.code == 2 and "earlier version. Give --speed" in capsys.readouterr().err
    main_ok([*like, "--speed", "exact", "--device", "cpu"])
    assert np.array_equal(np.asarray(portrait.image), np.asarray(Image.open(tmp_path / "b.png")))


def test_likeness_is_none_with_a_reason_when_it_cannot_be_measured() -> None:
    portrait = made()
    assert portrait.likeness is None and portrait.likeness_note
