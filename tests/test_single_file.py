"""A base in one file, as model sites share it, equals the diffusers folder that it came from."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

import idgen
from idgen.backbone import Backbone
from idgen.errors import BadWeights, IdgenError, WeightsMissing
from idgen.single_file import read_models
from idgen.weights.manifest import get_entry
from tests import single_file, tiny

FOLDERS = {"sdxl": tiny.SDXL, "sd15": tiny.SD15}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
ADAPTERS = {"sdxl": "instantid", "sd15": "ip-adapter"}
FAMILIES = pytest.mark.parametrize("family", list(FOLDERS))


@pytest.fixture(scope="module", params=list(FOLDERS))
def shared_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, single_file.write(FOLDERS[request.param], folder / f"{request.param}.safetensors")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def empty_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that has no weights and no network; returns the folder of idgen's own store."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("IDGEN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("IDGEN_MANIFEST", raising=False)
    return tmp_path / "home"


def load(path: Path, config: Path | None) -> Backbone:
    return Backbone.load(path, device="cpu", dtype="float32", config=config)


@lru_cache
def from_folder(family: str) -> Backbone:
    """One for all tests: none changes it."""
    return aligned(tiny.backbone(family))


def aligned(backbone: Backbone) -> Backbone:
    """The same weights in memory of their own: torch's sums on a CPU depend, in the last bit, on how the memory is
    aligned, and that of weights still in their file is as it happens to be."""
    for part in PARTS:
        if module := getattr(backbone.pipe, part, None):
            module.load_state_dict({key: v.clone() for key, v in module.state_dict().items()}, assign=True)
    return backbone


def weights(backbone: Backbone) -> dict[str, Tensor]:
    modules = {part: getattr(backbone.pipe, part, None) for part in PARTS}
    return {f"{part}.{key}": v for part, m in modules.items() if m is not None for key, v in m.state_dict().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


def refusal(path: Path, config: Path | None, kind: type[IdgenError]) -> str:
    """The message with which loading is refused; it names the file and shows no chain of inner errors."""
    with pytest.raises(kind) as caught:
        load(path, config)
    error = caught.value
    assert type(error) is kind
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)
    assert str(path) in str(error)
    assert "Traceback" not in str(error) and "Error" not in str(error)
    return str(error)


def test_single_file_gives_the_latents_and_the_image_of_the_folder_bit_for_bit(
    shared_file: tuple[str, Path], no_network: None
) -> None:
    family, path = shared_file
    ours, folder = aligned(load(path, FOLDERS[family])), from_folder(family)
    assert ours.family == family and ours.default_size == folder.default_size
    assert_same(weights(ours), weights(folder))
    assert ours.scheduler.config == folder.scheduler.config
    fields = {"negative_prompt": "lowres", "seed": 3, "output": "latent", **tiny.SMALL}
    a, b = (tiny.load("text-to-image", base).generate(None, "a (man:1.2), a tree", **fields) for base in (ours, folder))
    assert torch.equal(a, b)
    assert torch.equal(ours.decode(a), folder.decode(b))


def test_an_identity_adapter_on_the_single_file_equals_one_on_the_folder(
    shared_file: tuple[str, Path], no_network: None
) -> None:
    family, path = shared_file
    name = ADAPTERS[family]
    who = tiny.person().crop if name == "ip-adapter" else tiny.person()
    ours = idgen.load(name, base=path, config=FOLDERS[family], device="cpu", dtype="float32", **tiny.FILES[name])
    aligned(ours.backbone)
    pipelines = (ours, tiny.load(name, from_folder(family)))
    a, b = (pipeline.generate(who, "a man", seed=3, output="latent", **tiny.SMALL) for pipeline in pipelines)
    assert torch.equal(a, b)


def test_diffusers_reads_the_same_weights_from_the_test_files(shared_file: tuple[str, Path]) -> None:
    family, path = shared_file
    ours = weights(load(path, FOLDERS[family]))
    for part, cls in {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}.items():
        theirs = cls.from_single_file(str(path), config=str(FOLDERS[family]), subfolder=part, local_files_only=True)
        assert_same({f"{part}.{key}": v for key, v in theirs.state_dict().items()}, of_part(ours, part))
    if family == "sdxl":
        encoder = from_folder("sdxl").pipe.text_encoder_2
        theirs = convert_open_clip_checkpoint(encoder, load_file(path), prefix="conditioner.embedders.1.model.")
        assert_same({f"text_encoder_2.{key}": v for key, v in theirs.items()}, of_part(ours, "text_encoder_2"))


def of_part(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.startswith(part + ".")}


@FAMILIES
def test_a_folder_of_descriptions_without_weights_is_enough(family: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDERS[family], tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    path = single_file.write(FOLDERS[family], tmp_path / "base.safetensors")
    assert_same(weights(load(path, tmp_path / "config")), weights(from_folder(family)))


def without_text_level(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): v
        for key, v in state.items()
    }


def linear_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: v[:, :, 0, 0] if ".mid.attn_1." in key and v.ndim == 4 else v for key, v in state.items()}


@pytest.mark.parametrize("change", [without_text_level, linear_attention])
def test_other_spellings_of_the_layout_that_are_shared_load_too(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    plain = single_file.convert(tiny.SD15)
    state = change(plain)
    assert {key: v.shape for key, v in state.items()} != {key: v.shape for key, v in plain.items()}
    path = single_file.write(tiny.SD15, tmp_path / "base.safetensors", state)
    assert_same(weights(load(path, tiny.SD15)), weights(from_folder("sd15")))


def test_a_half_precision_file_computes_in_the_format_asked_for(tmp_path: Path) -> None:
    state = {key: v.half() if v.is_floating_point() else v for key, v in single_file.convert(tiny.SDXL).items()}
    backbone = load(single_file.write(tiny.SDXL, tmp_path / "base.safetensors", state), tiny.SDXL)
    expected = {key: v.half().float() for key, v in weights(from_folder("sdxl")).items()}
    assert_same(weights(backbone), expected)


ONE_OF_EACH = [
    ("sdxl", "model.diffusion_model.output_blocks.3.2.conv.weight"),
    ("sdxl", "model.diffusion_model.label_emb.0.2.bias"),
    ("sdxl", "first_stage_model.decoder.up.3.block.0.norm1.weight"),
    ("sdxl", "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.weight"),
    ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight"),
    ("sdxl", "conditioner.embedders.1.model.text_projection"),
    ("sd15", "model.diffusion_model.input_blocks.2.0.op.weight"),
    ("sd15", "first_stage_model.encoder.mid.attn_1.q.weight"),
    ("sd15", "cond_stage_model.transformer.text_model.final_layer_norm.bias"),
]


@pytest.mark.parametrize(("family", "key"), ONE_OF_EACH)
def test_a_missing_tensor_and_one_of_another_size_are_refused_by_name(family: str, key: str, tmp_path: Path) -> None:
    state = dict(single_file.convert(FOLDERS[family]))
    whole = state.pop(key)
    path = single_file.write(FOLDERS[family], tmp_path / "base.safetensors", state)
    assert repr(key) in refusal(path, FOLDERS[family], BadWeights)
    wrong = torch.zeros(whole.shape[0] + 3, *whole.shape[1:])
    single_file.write(FOLDERS[family], path, state | {key: wrong})
    message = refusal(path, FOLDERS[family], BadWeights)
    assert repr(key) in message and str(list(wrong.shape)) in message
    # Of a 1x1 convolution, the size as a linear layer.
    assert str(list(whole.shape)).removesuffix(", 1, 1]") in message


@pytest.mark.parametrize("kept", [4, 1000, 0.999])
def test_a_truncated_file_is_refused(kept: float, tmp_path: Path) -> None:
    path = single_file.write(tiny.SDXL, tmp_path / "base.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    with pytest.raises(BadWeights, match="damaged") as caught:
        load(path, tiny.SDXL)
    assert str(path) in str(caught.value)


def test_a_file_without_the_text_encoders_of_sdxl_or_sd15_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_file({key: v.contiguous() for key, v in single_file.unet(*single_file.part(tiny.SDXL, "unet")).items()}, path)
    assert "text encoders" in refusal(path, tiny.SDXL, BadWeights)


def test_a_config_folder_that_is_absent_damaged_incomplete_or_of_the_other_family_is_refused(tmp_path: Path) -> None:
    path = single_file.write(tiny.SD15, tmp_path / "base.safetensors")
    assert "config=" in refusal(path, tmp_path / "nothing", WeightsMissing)
    assert "StableDiffusionXLPipeline" in refusal(path, tiny.SDXL, BadWeights)
    config = tmp_path / "config"
    shutil.copytree(tiny.SD15, config, ignore=shutil.ignore_patterns("*.safetensors"))
    (config / "text_encoder/config.json").unlink()
    assert str(config) in refusal(path, config, BadWeights)
    (config / "model_index.json").write_text("{")
    assert "model_index.json" in refusal(path, config, BadWeights)


def test_without_config_and_network_the_message_says_what_to_give(
    shared_file: tuple[str, Path], empty_machine: Path, no_network: None
) -> None:
    family, path = shared_file
    with pytest.raises(WeightsMissing, match="config=") as caught:
        load(path, None)
    assert str(path) in str(caught.value) and f"idgen weights pull {family}" in str(caught.value)


def test_without_config_the_stores_base_of_the_family_describes_the_file(
    shared_file: tuple[str, Path], empty_machine: Path, no_network: None
) -> None:
    family, path = shared_file
    here = empty_machine / "models" / family
    shutil.copytree(FOLDERS[family], here)
    for weight in here.rglob("*.safetensors"):
        weight.rename(weight.with_suffix(".fp16.safetensors"))
    (here / "feature_extractor").mkdir()
    (here / "feature_extractor/preprocessor_config.json").write_text("{}")
    assert_same(weights(load(path, None)), weights(from_folder(family)))


def test_without_config_a_description_in_the_hubs_cache_is_enough(
    shared_file: tuple[str, Path], empty_machine: Path, no_network: None
) -> None:
    family, path = shared_file
    here = empty_machine.parent / "hub" / f"models--{get_entry(family).repo}".replace("/", "--")
    snapshot = here / "snapshots" / ("a" * 40)
    shutil.copytree(FOLDERS[family], snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (snapshot / "feature_extractor").mkdir()
    (snapshot / "feature_extractor/preprocessor_config.json").write_text("{}")
    (here / "refs").mkdir()
    (here / "refs/main").write_text("a" * 40)
    assert_same(weights(load(path, None)), weights(from_folder(family)))


def test_each_tensor_goes_to_its_device_and_dtype_as_it_is_read(shared_file: tuple[str, Path]) -> None:
    """``meta`` stands for a GPU: a tensor left behind on the CPU would show."""
    family, path = shared_file
    for model in read_models(path, FOLDERS[family], family, torch.bfloat16, "meta").values():
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
