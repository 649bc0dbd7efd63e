"""Pipelines share one backbone and leave no trace on it."""

from __future__ import annotations

import gc
import hashlib
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import idgen
from idgen.adapters.attention import attention_layers
from idgen.backbone import Backbone, choose_device, choose_dtype
from idgen.errors import BadRequest, BadWeights, WeightsMissing
from idgen.preview import preview
from tests import tiny

NAMES = {"sdxl": ["instantid", "ip-adapter-faceid-plusv2"], "sd15": ["ip-adapter"]}


def fingerprint(backbone: Backbone) -> str:
    """Of every weight, every buffer and every attention processor's class."""
    digest = hashlib.sha256()
    for part in (backbone.unet, backbone.vae, backbone.pipe.text_encoder):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    for name, layer in attention_layers(backbone.unet):
        digest.update(f"{name} {type(layer.processor).__qualname__} {id(layer.processor)}".encode())
    return digest.hexdigest()


def plain(backbone: Backbone) -> torch.Tensor:
    return tiny.load("text-to-image", backbone).generate(None, "a man", seed=3, output="latent", **tiny.SMALL)


def who(name: str):
    return tiny.person().crop if name == "ip-adapter" else tiny.person()


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in NAMES.items() for name in names])
def test_backbone_and_plain_output_are_bit_equal_before_and_after_a_pipeline_ran(family: str, name: str) -> None:
    backbone = tiny.backbone(family)
    weights, picture = fingerprint(backbone), plain(backbone)
    with_identity = tiny.load(name, backbone).generate(who(name), "a man", seed=3, output="latent", **tiny.SMALL)
    assert not torch.equal(with_identity, picture)
    assert fingerprint(backbone) == weights
    assert torch.equal(plain(backbone), picture)


def test_backbone_is_restored_when_the_run_breaks_off() -> None:
    backbone = tiny.backbone()
    weights = fingerprint(backbone)
    pipeline = tiny.load("instantid", backbone)
    embedding = pipeline.methods[0].controlnet.controlnet_cond_embedding
    with pytest.raises(idgen.Cancelled):
        pipeline.generate(tiny.person(), "a man", callback=lambda step: False, **tiny.SMALL)
    with pytest.raises(ZeroDivisionError):
        pipeline.generate(tiny.person(), "a man", callback=lambda step: 1 // 0, **tiny.SMALL)
    assert fingerprint(backbone) == weights
    assert pipeline.methods[0].controlnet.controlnet_cond_embedding is embedding


def test_ten_switches_between_pipelines_leave_no_modules_and_no_tensors_behind() -> None:
    backbone = tiny.backbone()
    pipelines = [tiny.load(name, backbone) for name in NAMES["sdxl"]]

    def run() -> tuple[int, int]:
        for pipeline in pipelines:
            pipeline.generate(tiny.person(), "a man", seed=1, output="latent", **tiny.SMALL)
        gc.collect()
        tensors = sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor))
        return tensors, sum(1 for _ in backbone.unet.modules())

    run()
    before = run()
    for _ in range(10):
        after = run()
    assert after == before


def test_two_pipelines_at_once_differ_from_each_alone() -> None:
    backbone = tiny.backbone()
    files = tiny.FILES
    one = tiny.load("instantid", backbone)
    two = tiny.load("ip-adapter-faceid-plusv2", backbone)
    from idgen.pipeline import Pipeline

    both = Pipeline(backbone, [*one.methods, *two.methods], None)
    assert both.name == "instantid+ip-adapter-faceid-plusv2" and files
    common = {"seed": 5, "guidance": 5.0, "output": "latent", "scheduler": "euler", **tiny.SMALL}
    a, b, c = (p.generate(tiny.person(), "a man", **common) for p in (one, two, both))
    assert (a - c).abs().max() > 1e-3 and (b - c).abs().max() > 1e-3 and (a - b).abs().max() > 1e-3


def lora_file(backbone: Backbone, folder: Path) -> Path:
    """A rank-2 LoRA on one cross-attention layer, in diffusers' format."""
    name, layer = next((n, m) for n, m in attention_layers(backbone.unet) if m.is_cross_attention)
    generator = torch.Generator().manual_seed(0)
    width_in, width_out = layer.to_q.in_features, layer.to_q.out_features
    path = folder / "style.safetensors"
    save_file(
        {
            f"unet.{name}.to_q.lora_A.weight": torch.randn(2, width_in, generator=generator),
            f"unet.{name}.to_q.lora_B.weight": torch.randn(width_out, 2, generator=generator),
        },
        path,
    )
    return path


@pytest.mark.parametrize("name", NAMES["sdxl"])
def test_a_users_lora_acts_beside_an_identity_adapter_and_can_be_taken_out(name: str, tmp_path: Path) -> None:
    backbone = tiny.backbone()
    pipeline = tiny.load(name, backbone)
    run = lambda: pipeline.generate(tiny.person(), "a man", seed=2, output="latent", **tiny.SMALL)  # noqa: E731
    without = run()
    backbone.load_lora(lora_file(backbone, tmp_path), 0.9)
    full = run()
    assert (full - without).abs().max() > 1e-3
    assert backbone.loras()
    backbone.unload_loras()
    assert torch.equal(run(), without)


@pytest.mark.parametrize("source", ["nowhere.safetensors", "owner/nowhere.bin", Path("folder") / "nowhere.pt"])
def test_a_file_of_the_users_that_is_not_there_is_said_to_be_missing_before_anybody_asks_the_hub(
    source: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny.backbone()
    for loader in ("load_lora_weights", "load_textual_inversion"):
        monkeypatch.setattr(backbone.pipe, loader, lambda *_, **__: pytest.fail("asked"))
    for load in (backbone.load_lora, backbone.load_embedding):
        with pytest.raises(WeightsMissing, match=r"no file .*nowhere.*give"):
            load(source)
    assert backbone.loras() == []


def test_a_hub_that_cannot_be_reached_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    class ConnectError(Exception):  # as httpx's, which is no OSError
        __module__ = "httpx"

    def fail(*_: object, **__: object) -> None:
        raise ConnectError("[Errno -2] Name or service not known\nand 60 lines")

    backbone = tiny.backbone()
    for load, loader in (("load_lora", "load_lora_weights"), ("load_embedding", "load_textual_inversion")):
        with pytest.raises(WeightsMissing, match=r"owner/style.*hf download owner/style"):  # offline, as all tests are
            getattr(backbone, load)("owner/style")
        monkeypatch.setattr(backbone.pipe, loader, fail)
        with pytest.raises(WeightsMissing, match=r"could not be fetched.*not known\).*hf download") as caught:
            getattr(backbone, load)("owner/style")
        assert "60 lines" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_file_that_is_no_lora_and_no_embedding_is_refused(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"text.{suffix}"
    file.write_text("not weights")
    backbone = tiny.backbone()
    for load in (backbone.load_lora, backbone.load_embedding):
        with pytest.raises(BadWeights, match=f"text.{suffix} is not a"):
            load(file)


@pytest.mark.parametrize("scheduler", ["euler", "ddim", "dpm++-2m", "unipc", "lcm", "heun"])
def test_a_strength_too_small_for_a_whole_step_still_does_one(scheduler: str) -> None:
    pipeline = tiny.shared("instantid")
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, int]] = []
    fields = {**tiny.SMALL, "image": picture, "seed": 1, "scheduler": scheduler, "steps": 5, "output": "latent"}
    count = lambda step: seen.append((step.index, step.total))  # noqa: E731
    least = pipeline.generate(tiny.person(), "x", strength=0.05, callback=count, **fields)
    assert seen == [(0, 1)] and least.isfinite().all()
    assert torch.equal(least, pipeline.generate(tiny.person(), "x", strength=0.2, **fields))


def test_a_seed_gives_the_same_image_whatever_the_batch_and_the_number_of_images() -> None:
    pipeline = tiny.shared("ip-adapter-faceid-plusv2")
    four = pipeline.generate(tiny.person(), "a man", seed=7, n=4, output="latent", **tiny.SMALL)
    for k in range(4):
        alone = pipeline.generate(tiny.person(), "a man", seed=7 + k, output="latent", **tiny.SMALL)
        assert (alone[0] - four[k]).abs().max() <= 1e-4 * max(1, alone.abs().max())


def test_people_prompts_and_scales_of_one_batch_do_not_mix() -> None:
    pipeline = tiny.shared("instantid")
    build = idgen.Request.create
    requests = [
        build(who=tiny.person(0), prompt="a man", seed=1, identity_scale=0.3, **tiny.SMALL),
        build(who=tiny.person(1), prompt="a woman, a tree", seed=2, structure_scale=0.2, **tiny.SMALL),
        build(who=tiny.person(2), prompt="a man", negative_prompt="lowres", seed=3, n=2, **tiny.SMALL),
    ]
    together = pipeline.generate_many(requests, output="latent")
    alone = torch.cat([pipeline.generate_many([request], output="latent") for request in requests])
    assert (together - alone).abs().max() <= 1e-4 * max(1, alone.abs().max())


def test_structure_network_does_not_run_where_its_scale_is_zero_or_outside_its_interval() -> None:
    pipeline = tiny.shared("instantid")
    calls: list[int] = []
    handle = pipeline.methods[0].controlnet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        run = lambda **f: pipeline.generate(tiny.person(), "x", seed=1, output="latent", **(tiny.SMALL | f))  # noqa: E731
        run(structure_scale=0.0)
        assert not calls
        run(steps=4, structure_end=0.5)
        assert len(calls) == 2
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "scheduler", ["euler", "euler-a", "ddim", "dpm++-2m", "dpm++-2m-karras", "unipc", "lcm", "heun"]
)
def test_every_scheduler_runs_and_repeats(scheduler: str) -> None:
    pipeline = tiny.shared("ip-adapter-faceid-plusv2")
    run = lambda: pipeline.generate(  # noqa: E731
        tiny.person(), "a man", seed=4, n=2, scheduler=scheduler, output="latent", **tiny.SMALL
    )
    first = run()
    assert first.isfinite().all()
    assert torch.equal(run(), first)


def test_inpainting_keeps_what_the_mask_leaves_black() -> None:
    pipeline = tiny.shared("instantid")
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(64, 64, 3, dtype=torch.uint8)
    mask[:, 32:] = 255
    out = pipeline.generate(
        tiny.person(), "x", seed=1, image=picture, mask=mask.numpy(), strength=1.0, output="latent", **tiny.SMALL
    )
    generator = torch.Generator().manual_seed(1)
    kept = pipeline.backbone.encode_image(picture, [generator])
    assert torch.allclose(out[..., :4], kept[..., :4], atol=1e-5)
    assert (out[..., 4:] - kept[..., 4:]).abs().max() > 1e-2


def test_a_region_confines_an_identity_to_its_part_of_the_picture() -> None:
    from idgen.conditioning import Start
    from idgen.sampler import sample, seeded_noise
    from idgen.schedulers import make_scheduler

    pipeline = tiny.shared("ip-adapter-faceid-plusv2")
    order = pipeline.order(idgen.Request.create(who=tiny.person(), prompt="x", seed=1, **tiny.SMALL))

    def run(region: torch.Tensor | None) -> torch.Tensor:
        conditioning = pipeline.condition([order])
        conditioning.loras.clear()
        conditioning.streams[0].region = region
        noise, _ = seeded_noise(pipeline.backbone, [1], 64, 64)
        scheduler = make_scheduler(None, pipeline.backbone.scheduler)
        return sample(pipeline.backbone, conditioning, Start(noise), scheduler, steps=1, guidance=1.0)

    nowhere, everywhere, plain_ = run(torch.zeros(1, 1, 64, 64)), run(torch.ones(1, 1, 64, 64)), run(None)
    assert torch.allclose(everywhere, plain_, atol=1e-5)
    assert (nowhere - plain_).abs().max() > 1e-3
    half = torch.zeros(1, 1, 64, 64)
    half[..., :32] = 1
    left = run(half)
    assert (left - nowhere)[..., :4].abs().mean() > (left - nowhere)[..., 4:].abs().mean()


def test_preview_is_a_picture_of_the_output_size_and_follows_the_latents() -> None:
    backbone = tiny.backbone()
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    images = preview(backbone, latents)
    assert [image.size for image in images] == [(96, 64), (96, 64)]
    assert images[0].tobytes() != images[1].tobytes()


def test_device_and_dtype_choices_give_reasons_and_refuse_what_is_not_there() -> None:
    device, reason = choose_device()
    assert device in ("cpu", "cuda", "mps") and reason
    assert choose_dtype("cpu") == ("float32", choose_dtype("cpu")[1])
    with pytest.raises(BadRequest, match="unknown"):
        choose_device("tpu")
    with pytest.raises(BadRequest, match="unknown"):
        choose_dtype("cpu", "int3")
    if not torch.cuda.is_available():
        with pytest.raises(BadRequest, match="torch sees none"):
            choose_device("cuda")


def test_one_base_serves_all_pipelines_that_ask_for_it_and_leaves_memory_with_the_last() -> None:
    one, other = (idgen.load(name, base="mini-xl", vae_tiling=True) for name in ("instantid", "ip-adapter-faceid"))
    assert one.backbone is other.backbone
    base = weakref.ref(one.backbone.unet)
    del one
    gc.collect()
    assert idgen.load("text-to-image", base="mini-xl", vae_tiling=True).backbone is other.backbone
    del other
    gc.collect()
    assert base() is None


def test_a_base_that_is_none_is_refused_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing):
        Backbone.load(tmp_path / "nothing")
    with pytest.raises(BadWeights, match="model_index"):
        Backbone.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(BadWeights, match="FluxPipeline"):
        Backbone.load(tmp_path)
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(BadWeights, match="damaged"):
        Backbone.load(broken)
    save_file({"something": torch.zeros(1)}, broken)
    with pytest.raises(BadWeights, match=r"model\.diffusion_model"):
        Backbone.load(broken)
