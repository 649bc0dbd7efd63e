"""Weights written in another number format load to the same bits as the originals converted while loading."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from idgen.backbone import Backbone
from idgen.errors import BadRequest, BadWeights
from idgen.weights.convert import convert
from tests import tiny


def weights_of(backbone: Backbone) -> dict[str, torch.Tensor]:
    parts = {"unet": backbone.unet, "vae": backbone.vae, "text": backbone.pipe.text_encoder}
    return {f"{part}.{name}": t for part, model in parts.items() for name, t in model.state_dict().items()}


def load(source: Path, **settings: Any) -> dict[str, torch.Tensor]:
    return weights_of(Backbone.load(source, device="cpu", dtype="bfloat16", **settings))


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def test_a_folder_loads_to_the_same_bits_and_holds_every_float_in_the_format(tmp_path: Path) -> None:
    made = convert(tiny.SDXL, tmp_path / "bf16")
    assert_same_bits(load(made), load(tiny.SDXL))
    for path in made.rglob("*.safetensors"):
        before, after = load_file(tiny.SDXL / path.relative_to(made)), load_file(path)
        assert before.keys() == after.keys()
        for name, tensor in after.items():
            assert tensor.dtype == (torch.bfloat16 if before[name].is_floating_point() else before[name].dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


def test_a_single_file_keeps_its_names_and_metadata(tmp_path: Path) -> None:
    source = tmp_path / "base.safetensors"
    save_file({"w": torch.randn(3, 2), "ids": torch.arange(3)}, source, {"format": "pt", "title": "mine"})
    with safe_open(convert(source, tmp_path / "half.safetensors", "float16"), "pt") as file:
        assert file.metadata() == {"format": "pt", "title": "mine"}
        assert file.get_tensor("w").dtype == torch.float16 and torch.equal(file.get_tensor("ids"), torch.arange(3))
        assert torch.equal(file.get_tensor("w"), load_file(source)["w"].half())


def test_a_variant_gets_the_plain_name_and_is_left_out_beside_the_plain_file(tmp_path: Path) -> None:
    source = shutil.copytree(tiny.SDXL, tmp_path / "source")
    name = "diffusion_pytorch_model.safetensors"
    (source / "unet" / name).rename(source / "unet" / name.replace("model.", "model.fp16."))
    (source / "vae" / name.replace("model.", "model.fp16.")).write_bytes(b"not even read")
    (source / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    made = convert(source, tmp_path / "made")
    assert [path.name for path in (made / "unet").glob("*.safetensors")] == [name]
    assert sorted(path.name for path in (made / "vae").iterdir()) == ["config.json", name]
    assert_same_bits(load(made), load(tiny.SDXL))


def test_shards_stay_shards_with_their_new_size(tmp_path: Path) -> None:
    source = shutil.copytree(tiny.SDXL, tmp_path / "source")
    backbone = Backbone.load(source, device="cpu", dtype="float32")
    shutil.rmtree(source / "unet")
    backbone.unet.save_pretrained(source / "unet", max_shard_size="200KB")
    assert len(list((source / "unet").glob("*.safetensors"))) > 1
    made = convert(source, tmp_path / "made")
    assert_same_bits(load(made), load(tiny.SDXL))
    sizes = [sum(p.stat().st_size for p in (each / "unet").glob("*.safetensors")) for each in (made, source)]
    index = json.loads((made / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("absent", BadRequest, "no file or folder"),
        ("taken", BadRequest, "there already"),
        ("dtype", BadRequest, "bfloat16, float16, float32"),
        ("pickle", BadRequest, "pickle"),
        ("folder of pickles", BadWeights, "pickle"),
        ("empty", BadWeights, "holds no"),
        ("damaged", BadWeights, "damaged"),
        ("too large", BadWeights, "'w' are too large for float16"),
        ("nowhere", BadRequest, "cannot be written"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(
    tmp_path: Path, case: str, kind: type[Exception], words: str
) -> None:
    source, dest, dtype = tmp_path / "a.safetensors", tmp_path / "b.safetensors", "float16"
    save_file({"w": torch.tensor([1e6 if case == "too large" else 1.0])}, source)
    if case == "absent":
        source = tmp_path / "none"
    elif case == "taken":
        dest.touch()
    elif case == "dtype":
        dtype = "int4"
    elif case == "pickle":
        source = source.rename(tmp_path / "a.ckpt")
    elif case in ("folder of pickles", "empty"):
        source.unlink()
        source = tmp_path / "folder"
        source.mkdir()
        (source / ("a.bin" if case != "empty" else "a.txt")).touch()
        dest = tmp_path / "made"
    elif case == "damaged":
        source.write_bytes(source.read_bytes()[:20])
    elif case == "nowhere":
        dest = tmp_path / "none" / "b.safetensors"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=words):
        convert(source, dest, dtype)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size, which stands for a full disk here")
def test_a_disk_that_is_full_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    import resource

    source, dest = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"w": torch.zeros(100_000)}, source)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(BadRequest, match=r"b\.safetensors cannot be written"):
            convert(source, dest, "float16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [source]


def test_the_command_writes_the_copy_or_says_why_not(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from idgen.cli.weights import app

    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    arguments = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--dtype", "bfloat16"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert load_file(tmp_path / "b.safetensors")["w"].dtype == torch.bfloat16
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "there already" in again.output
