"""Weight files that are not what they claim: one clear error each, and no code is ever run."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import idgen
from idgen.adapters.checkpoints import read_adapter, read_tensors
from idgen.adapters.control import load_controlnet
from idgen.adapters.face_tokens import load_text_encoder
from idgen.adapters.image_encoder import ImageEncoder
from idgen.errors import BadWeights, IdgenError, WeightsMissing
from tests import tiny


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def state() -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(tiny.FACEID, weights_only=True)


def save(folder: Path, table: object) -> Path:
    path = folder / "adapter.bin"
    torch.save(table, path)
    return path


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for table in ({"image_proj": Bomb(mark)}, Bomb(mark)):
        with pytest.raises(BadWeights, match="was not run"):
            read_tensors(save(tmp_path, table))
    plain = tmp_path / "plain.bin"
    plain.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(BadWeights):
        read_tensors(plain)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04", b"PK\x03\x04broken", b"<!DOCTYPE html>"])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_what_is_no_weight_file_is_bad_weights_and_named(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadWeights, match="file"):
        read_adapter(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_bad_weights(share: float, tmp_path: Path) -> None:
    data = tiny.FACEID.read_bytes()
    path = tmp_path / "cut.bin"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(BadWeights):
        read_adapter(path)


def test_a_file_that_is_not_there_is_weights_missing(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing):
        read_adapter(tmp_path / "nothing.bin")


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("image_proj", "norm.weight"),
        ("image_proj", "proj.0.bias"),
        ("image_proj", "perceiver_resampler.layers.0.0.to_kv.weight"),
        ("image_proj", "perceiver_resampler.proj_in.weight"),
        ("ip_adapter", "1.to_k_ip.weight"),
        ("ip_adapter", "3.to_v_ip.weight"),
        ("ip_adapter", "2.to_q_lora.down.weight"),
    ],
)
def test_the_first_missing_key_is_named(part: str, key: str, tmp_path: Path) -> None:
    table = state()
    del table[part][key]
    with pytest.raises(BadWeights, match=key.replace(".", r"\.")):
        read_adapter(save(tmp_path, table))


def test_an_extra_key_is_named(tmp_path: Path) -> None:
    for part, key in (("image_proj", "surprise.weight"), ("ip_adapter", "1.to_x.weight"), ("else", "x")):
        table = state()
        table.setdefault(part, {})[key] = torch.zeros(2)
        with pytest.raises(BadWeights, match=key.replace(".", r"\.")):
            read_adapter(save(tmp_path, table))


def test_a_misshapen_tensor_is_named(tmp_path: Path) -> None:
    table = state()
    table["image_proj"]["proj.0.bias"] = torch.zeros(3)
    with pytest.raises(BadWeights, match=r"proj\.0\.bias.*\(3,\)"):
        read_adapter(save(tmp_path, table))
    table = state()
    table["ip_adapter"]["3.to_v_ip.weight"] = torch.zeros(3, 64)
    path = save(tmp_path, table)
    pipeline = idgen.load("ip-adapter-faceid-plusv2", base=tiny.backbone(), adapter=path, image_encoder=tiny.ENCODER)
    with pytest.raises(BadWeights, match=r"3\.to_v_ip\.weight.*another base"):
        pipeline.generate(tiny.person(), "x", **tiny.SMALL)


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    table = state()
    table["image_proj"]["norm.weight"][0] = float("nan")
    with pytest.raises(BadWeights, match=r"norm\.weight"):
        read_adapter(save(tmp_path, table))


def test_safetensors_and_pickle_of_the_same_adapter_give_the_same_picture(tmp_path: Path) -> None:
    flat = {f"{part}.{key}": value for part, table in state().items() for key, value in table.items()}
    save_file(flat, tmp_path / "adapter.safetensors")
    base = tiny.backbone()
    outputs = [
        idgen.load("ip-adapter-faceid-plusv2", base=base, adapter=path, image_encoder=tiny.ENCODER).generate(
            tiny.person(), "a man", seed=1, output="latent", **tiny.SMALL
        )
        for path in (tiny.FACEID, tmp_path / "adapter.safetensors")
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("instantid", {"adapter": tiny.FACEID, "controlnet": tiny.INSTANTID / "ControlNetModel"}),
        ("ip-adapter-faceid", {"adapter": tiny.FACEID}),
        ("ip-adapter-faceid-plusv2", {"adapter": tiny.INSTANTID / "ip-adapter.bin", "image_encoder": tiny.ENCODER}),
        ("ip-adapter", {"adapter": tiny.FACEID, "image_encoder": tiny.ENCODER}),
    ],
)
def test_an_adapter_of_another_method_is_refused_by_name(name: str, files: dict[str, Path]) -> None:
    with pytest.raises(BadWeights, match=str(files["adapter"].name)):
        idgen.load(name, base=tiny.backbone(), **files)


def damaged(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    from safetensors.torch import load_file

    shutil.copytree(source, target)
    file = next(target.glob("*.safetensors"))
    table = load_file(file)
    change(table)
    save_file(table, file)
    return target


@pytest.mark.parametrize(
    ("source", "load"),
    [
        (tiny.INSTANTID / "ControlNetModel", lambda p: load_controlnet(p, "cpu", torch.float32)),
        (tiny.ENCODER, lambda p: ImageEncoder.load(p, "cpu", torch.float32)),
    ],
)
def test_a_model_folder_with_missing_extra_or_misshapen_tensors_is_refused(
    source: Path, load: Callable[[Path], object], tmp_path: Path
) -> None:
    def drop(table: dict[str, torch.Tensor]) -> None:
        table.pop(sorted(table)[0])

    def add(table: dict[str, torch.Tensor]) -> None:
        table["surprise"] = torch.zeros(1)

    def reshape(table: dict[str, torch.Tensor]) -> None:
        table[sorted(table)[0]] = torch.zeros(1, 2, 3)

    for i, change in enumerate((drop, add, reshape)):
        with pytest.raises(BadWeights):
            load(damaged(source, tmp_path / str(i), change))
    with pytest.raises(WeightsMissing):
        load(tmp_path / "nothing")


def test_a_text_encoder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing):
        load_text_encoder(tmp_path)
    shutil.copytree(tiny.SD15 / "text_encoder", tmp_path / "encoder")
    load_text_encoder(tmp_path / "encoder")
    broken = damaged(tmp_path / "encoder", tmp_path / "broken", lambda t: t.pop(sorted(t)[0]))
    with pytest.raises(BadWeights, match="lacks"):
        load_text_encoder(broken)


def test_every_error_is_an_idgen_error() -> None:
    assert issubclass(BadWeights, IdgenError) and issubclass(WeightsMissing, IdgenError)


def test_tensors_of_an_adapter_are_mapped_from_the_file_not_copied(tmp_path: Path) -> None:
    torch.save({"image_proj": {"a": torch.ones(3)}}, tmp_path / "a.bin")
    (tensor,) = read_tensors(tmp_path / "a.bin").values()
    maps = Path("/proc/self/maps")  # Linux only
    assert not maps.exists() or str(tmp_path / "a.bin") in maps.read_text()
    assert torch.equal(tensor, torch.ones(3))
    torch.save({"a": torch.ones(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors(tmp_path / "old.bin")["a"], torch.ones(3))
