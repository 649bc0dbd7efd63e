"""Few-step LoRAs by name: merged as the public files mean it, with their publishers' settings, beside an adapter."""

from __future__ import annotations

import hashlib
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import idgen
import idgen.api  # before a test replaces `locate`, which it takes by name
from idgen.adapters.attention import attention_layers
from idgen.adapters.processor import is_plain
from idgen.backbone import Backbone
from idgen.cli import main
from idgen.errors import BadRequest, BadWeights, LicenceRefused, WeightsMissing
from idgen.few_step import FEW_STEP
from idgen.locate import locate
from idgen.pipeline import Pipeline
from idgen.portrait import read_metadata
from idgen.prepare import prepare
from idgen.schedulers import make_scheduler
from idgen.speed import Levers, choose_levers, preset
from idgen.weights.convert import convert
from idgen.weights.manifest import load_manifest
from tests import tiny

ALPHA, RANK = 1.0, 2


def layers(backbone: Backbone) -> list[str]:
    return [f"{name}.{part}" for name, _ in attention_layers(backbone.unet) for part in ("to_q", "to_out.0")]


def lora(backbone: Backbone, path: Path, style: str) -> dict[str, Tensor]:
    """A LoRA on queries and outputs of all attention layers; what it adds to each weight."""
    generator = torch.Generator().manual_seed(0)
    state, added = {}, {}
    for name in layers(backbone):
        weight = backbone.unet.get_submodule(name).weight
        down = torch.randn(RANK, weight.shape[1], generator=generator) * 0.3
        up = torch.randn(weight.shape[0], RANK, generator=generator) * 0.3
        if style == "kohya":
            stem = f"lora_unet_{name.replace('.', '_')}"
            state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            state[f"{stem}.alpha"] = torch.tensor(ALPHA)
            added[name] = up @ down * ALPHA / RANK
        else:
            state |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
            added[name] = up @ down
    save_file(state, path)
    return added


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place where every few-step LoRA is found."""
    monkeypatch.setattr("idgen.locate.locate", lambda entry: tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_the_lora_is_added_to_the_weights_and_leaves_plain_layers(here: Path, style: str) -> None:
    backbone = tiny.backbone()
    before = {name: backbone.unet.get_submodule(name).weight.clone() for name in layers(backbone)}
    keys = list(backbone.unet.state_dict())
    added = lora(backbone, here, style)
    prepare(backbone, [], Levers(few_step="lightning-4"))
    for name, weight in before.items():
        layer = backbone.unet.get_submodule(name)
        assert torch.allclose(layer.weight, weight + added[name], atol=1e-5), name
        assert is_plain(layer) and not layer.weight.requires_grad
    assert list(backbone.unet.state_dict()) == keys


def load(name: str, few_step: str, base: Backbone | None = None) -> Pipeline:
    return idgen.load(name, base=base or tiny.backbone(), speed=Levers(few_step=few_step), **tiny.FILES.get(name, {}))


@pytest.mark.parametrize("few_step", FEW_STEP)
def test_steps_guidance_and_scheduler_are_the_loras_unless_a_request_names_others(here: Path, few_step: str) -> None:
    lora(tiny.backbone(), here, "kohya")
    pipeline, settings = load("instantid", few_step), FEW_STEP[few_step]
    small = {"width": 64, "height": 64, "seed": 1}
    portrait = pipeline.generate(tiny.person(), "a man", **small)[0]
    record = portrait.provenance
    made = record["request"]
    assert (made["steps"], made["guidance"], made["scheduler"]) == (
        settings.steps,
        settings.guidance,
        settings.scheduler,
    )
    assert record["levers"]["few_step"] == few_step
    other = pipeline.generate(tiny.person(), "a man", steps=2, guidance=3.0, scheduler="euler", **small)[0]
    assert other.provenance["request"]["steps"] == 2 and other.provenance["request"]["scheduler"] == "euler"


def test_it_acts_as_the_same_lora_loaded_by_hand_and_beside_one(here: Path) -> None:
    by_hand = tiny.load("instantid")
    lora(by_hand.backbone, here, "kohya")
    by_hand.backbone.load_lora(here)
    pipeline = load("instantid", "lcm")
    run = lambda p: p.generate(  # noqa: E731
        tiny.person(), "x", seed=1, output="latent", **(tiny.SMALL | {"guidance": 1.5, "scheduler": "lcm"})
    )
    merged = run(pipeline)
    assert torch.allclose(merged, run(by_hand), atol=1e-3)
    assert not torch.allclose(merged, run(tiny.shared("instantid")), atol=1e-2)
    pipeline.backbone.load_lora(here, 0.5)
    assert not torch.allclose(run(pipeline), merged, atol=1e-3)
    pipeline.backbone.unload_loras()
    assert torch.equal(run(pipeline), merged)


def test_a_methods_own_unet_gets_the_lora_and_its_controlnet_does_not(here: Path) -> None:
    backbone, other = tiny.backbone(), tiny.backbone()
    added = lora(backbone, here, "kohya")
    before = {name: other.unet.get_submodule(name).weight.clone() for name in added}
    control = tiny.load("instantid", backbone).methods[0].controlnet  # type: ignore[attr-defined]
    untouched = {name: tensor.clone() for name, tensor in control.state_dict().items()}
    prepare(backbone, [other.unet, control], Levers(few_step="lcm"))
    for name, weight in before.items():
        assert torch.allclose(other.unet.get_submodule(name).weight, weight + added[name], atol=1e-5), name
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in control.state_dict().items())


def test_bases_by_name_with_and_without_it_are_two_and_every_record_says_which(here: Path) -> None:
    lora(tiny.backbone(), here, "kohya")
    by_name = {"base": str(tiny.SDXL), "device": "cpu", "dtype": "float32", **tiny.FILES["instantid"]}
    plain, quick = (idgen.load("instantid", speed=Levers(few_step=few), **by_name) for few in (None, "lcm"))
    assert plain.backbone is not quick.backbone
    late = idgen.load("instantid", base=quick.backbone, **tiny.FILES["instantid"])
    small = {"width": 64, "height": 64, "seed": 1, "steps": 2}
    records = [
        pipeline.generate(tiny.person(), "a man", speed=speed, **small)[0].provenance
        for pipeline, speed in ((plain, None), (quick, None), (quick, "fast"), (late, None), (late, "fast"))
    ]
    assert [record["levers"]["few_step"] for record in records] == [None, *["lcm"] * 4]
    assert [record["request"]["scheduler"] for record in records] == ["euler", *["lcm"] * 4]
    hashes = [record["weights"].get("few_step:lcm") for record in records]
    assert hashes == [None, *[hashlib.sha256(here.read_bytes()).hexdigest()] * 4]


def test_like_with_another_few_step_takes_its_settings_and_with_the_same_the_recorded_ones(
    here: Path, tmp_path: Path
) -> None:
    plain = tiny.load("instantid")
    lora(plain.backbone, here, "kohya")
    settings = {"width": 64, "height": 64, "seed": 1}
    plain.generate(tiny.person(), "x", steps=3, guidance=4.0, **settings)[0].save(tmp_path / "plain.png")
    load("instantid", "lcm").generate(tiny.person(), "x", steps=2, **settings)[0].save(tmp_path / "quick.png")

    def again(name: str, *options: str) -> tuple[int, float, str]:
        files = [f"--{role}={path}" for role, path in tiny.FILES["instantid"].items()]
        like, out = str(tmp_path / name), str(tmp_path / "again.png")
        with pytest.raises(SystemExit) as done:
            main(["generate", "--like", like, "--out", out, "--device", "cpu", *files, *options])
        assert done.value.code == 0
        request = read_metadata(tmp_path / "again.png")["request"]
        return request["steps"], request["guidance"], request["scheduler"]

    assert again("plain.png") == (3, 4.0, "euler") and again("quick.png") == (2, 1.5, "lcm")
    assert again("plain.png", "--few-step", "lcm") == (6, 1.5, "lcm")
    assert again("plain.png", "--few-step", "lcm", "--steps", "4") == (4, 1.5, "lcm")
    assert again("quick.png", "--speed", "exact", "--steps", "3") == (3, 5.0, "euler")


def test_a_pipeline_that_was_there_before_says_what_another_has_merged_since(here: Path) -> None:
    early = tiny.load("instantid")
    lora(early.backbone, here, "kohya")
    load("instantid", "lcm", early.backbone)
    assert early.levers.few_step == "lcm"


def test_the_public_timesteps_of_each_scheduler() -> None:
    base = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    expected = {
        "euler-trailing": [999, 749, 499, 249],
        "ddim-trailing": [999, 749, 499, 249],
        "dmd2": [999, 749, 499, 249],
    }
    for name, timesteps in expected.items():
        scheduler = make_scheduler(name, base)
        scheduler.set_timesteps(4)
        assert [int(t) for t in scheduler.timesteps] == timesteps


def test_a_scheduler_by_name_is_that_scheduler_whatever_the_bases_own() -> None:
    euler, ddim = diffusers.EulerDiscreteScheduler(), diffusers.DDIMScheduler(set_alpha_to_one=True)
    assert make_scheduler("euler-karras", euler).config.use_karras_sigmas
    assert not make_scheduler("euler", euler).config.use_karras_sigmas
    assert make_scheduler("ddim-trailing", ddim).config.timestep_spacing == "trailing"
    assert make_scheduler("ddim", ddim).config.set_alpha_to_one  # a zero-terminal-SNR base decides this itself
    assert not make_scheduler("ddim", euler).config.set_alpha_to_one


def test_more_steps_than_a_scheduler_has_are_refused_by_name() -> None:
    with pytest.raises(BadRequest, match="cannot make 9 steps") as caught:
        tiny.shared("instantid").generate(
            tiny.person(), "x", seed=1, **(tiny.SMALL | {"steps": 9, "scheduler": "dmd2"})
        )
    assert caught.value.field == "steps"


def test_what_cannot_be_merged_is_refused_with_the_cure(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backbone = tiny.backbone()
    lora(backbone, here, "diffusers")
    with pytest.raises(BadRequest, match="lcm"):
        prepare(tiny.backbone("sd15"), [], Levers(few_step="dmd2"))
    with pytest.raises(BadRequest, match="choose lcm, lightning-4, hyper-sd-8 or dmd2, or leave it out"):
        Levers(few_step="warp")
    with monkeypatch.context() as patch:
        patch.setenv("IDGEN_COMMERCIAL_ONLY", "1")
        with pytest.raises(LicenceRefused, match="dmd2"):
            prepare(backbone, [], Levers(few_step="dmd2"))
    prepare(backbone, [], Levers(few_step="lcm"))
    prepare(backbone, [], Levers(few_step="lcm"))  # once is enough
    with pytest.raises(BadRequest, match="already holds few_step='lcm'"):
        prepare(backbone, [], Levers(few_step="dmd2"))
    save_file({"something": torch.zeros(1)}, here)
    with pytest.raises(BadWeights):
        prepare(tiny.backbone(), [], Levers(few_step="lcm"))
    user = tiny.backbone()
    lora(user, here, "diffusers")
    user.offload = "sequential"
    with pytest.raises(BadRequest, match="use 'model'"):
        prepare(user, [], Levers(few_step="lcm"))
    user.offload = None
    user.load_lora(here)
    with pytest.raises(BadRequest, match="user LoRAs"):
        prepare(user, [], Levers(few_step="lcm"))


@pytest.mark.parametrize("few_step", FEW_STEP)
def test_mini_has_none_also_as_a_copy_and_the_base_to_use_is_named(few_step: str, tmp_path: Path) -> None:
    copy = convert(locate("mini-xl"), tmp_path / "copy", "float32")
    for base in ("mini-xl", copy):
        with pytest.raises(BadRequest, match=r"mini has no few-step LoRA: use the base sdxl.*pull sdxl "):
            idgen.load("text-to-image", base=base, device="cpu", speed=Levers(few_step=few_step))


def test_only_who_writes_python_is_told_of_levers() -> None:
    with pytest.raises(BadRequest, match=r"exact, fast or turbo, or give levers as idgen\.speed\.Levers"):
        choose_levers("quick")
    with pytest.raises(BadRequest, match=r"choose exact, fast or turbo\.$"):
        preset("quick")


def test_a_lora_that_is_not_here_names_the_command_that_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IDGEN_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match="idgen weights pull"):
        prepare(tiny.backbone(), [], Levers(few_step="lcm"))


def test_every_few_step_lora_is_in_the_manifest() -> None:
    manifest = load_manifest()
    for settings in FEW_STEP.values():
        for family, entry in settings.weights.items():
            assert manifest[entry].kind == "lora" and manifest[entry].base == family
