"""What the original implementations refuse or get wrong works here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

import idgen
from idgen import pipeline as pipeline_module
from idgen.errors import BadRequest
from tests import tiny


def latents(name: str, **fields: object) -> torch.Tensor:
    who = fields.pop("who", tiny.person())
    prompt = fields.pop("prompt", "a man")
    settings = {"seed": 3, "output": "latent", **tiny.SMALL} | fields
    return tiny.shared(name).generate(who, prompt, **settings)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max())))


def test_guess_mode_works_with_guidance_and_leaves_the_unconditional_half_alone() -> None:
    guessed = latents("instantid", guess_mode=True, guidance=5.0)
    assert guessed.isfinite().all()
    assert not same(guessed, latents("instantid", guidance=5.0))
    assert not same(guessed, latents("instantid", guidance=5.0, structure_scale=0.0))


def test_image_to_image_makes_several_images_each_as_if_alone() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    both = latents("instantid", image=picture, strength=0.7, n=2)
    for k in range(2):
        assert same(both[k : k + 1], latents("instantid", image=picture, strength=0.7, seed=3 + k))
    assert not same(both[:1], latents("instantid"))


@pytest.mark.parametrize("tiny_vae", [False, True])
def test_a_start_picture_is_encoded_and_the_record_made_once_for_all_images_of_a_request(
    tiny_vae: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IDGEN_HOME", str(tmp_path))
    pipeline = tiny.load("instantid", tiny.backbone())
    if tiny_vae:
        pipeline.backbone.pipe.vae = AutoencoderTiny(
            in_channels=3, out_channels=3, encoder_block_out_channels=(8, 8, 8, 8), num_encoder_blocks=(1, 1, 1, 1),
            decoder_block_out_channels=(8, 8, 8, 8), num_decoder_blocks=(1, 1, 1, 1),
        ).eval()  # fmt: skip
    calls: list[str] = []
    encode, record = pipeline.backbone.vae.encode, pipeline_module.provenance
    monkeypatch.setattr(pipeline.backbone.vae, "encode", lambda pixels: calls.append("encode") or encode(pixels))
    monkeypatch.setattr(pipeline_module, "provenance", lambda *given: calls.append("record") or record(*given))
    mask = Image.fromarray(np.tile(np.uint8([255] * 40 + [0] * 24), (64, 1)))
    build = idgen.Request.create
    orders = [
        build(who=tiny.person(), prompt="x", seed=seed, n=n, image=np.full((64, 64, 3), seed, np.uint8), mask=mask,
              strength=0.7, **tiny.SMALL)
        for seed, n in ((3, 3), (90, 2))
    ]  # fmt: skip
    together = pipeline.generate_many(orders)
    assert calls == ["encode", "encode", "record", "record"] and [len(made) for made in together] == [3, 2]
    alone = pipeline.generate_many([orders[0].change(seed=5, n=1)])[0][0]
    difference = np.asarray(together[0][2].image, int) - np.asarray(alone.image, int)
    assert np.abs(difference).max() <= 1


def test_the_scales_act_in_image_to_image_too() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    one = latents("instantid", image=picture, identity_scale=0.2)
    assert not same(one, latents("instantid", image=picture, identity_scale=1.0))


def test_the_scale_is_no_state_that_persists() -> None:
    before = latents("instantid")
    latents("instantid", identity_scale=0.0)
    assert same(latents("instantid"), before)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flash", "cudnn", "efficient", "math"])
def test_every_attention_backend_gives_the_same_numbers(backend: str) -> None:
    base = tiny.backbone()
    other = idgen.load("instantid", base=base, attention=backend, **tiny.FILES["instantid"])
    out = other.generate(tiny.person(), "a man", seed=3, output="latent", **tiny.SMALL)
    assert same(out, latents("instantid"))


def test_identity_is_dropped_at_scale_zero_and_another_person_changes_the_picture() -> None:
    assert not same(latents("instantid", who=tiny.person(1)), latents("instantid", who=tiny.person(0)))
    none = {"identity_scale": 0.0, "structure_scale": 0.0}
    assert same(latents("instantid", who=tiny.person(1), **none), latents("instantid", who=tiny.person(0), **none))


def test_a_pose_moves_the_face_structure_and_the_identitys_own_is_the_default() -> None:
    own = tiny.person().keypoints
    assert own is not None
    assert same(latents("instantid", pose=own), latents("instantid"))
    assert not same(latents("instantid", pose=own + 12), latents("instantid"))
    with pytest.raises(BadRequest, match="where the face goes"):
        latents("instantid", who=idgen.Identity(np.ones(512)))
    with pytest.raises(BadRequest, match="pose"):
        latents("instantid", pose=[[1, 2], [3, 4]])


def test_requests_that_cannot_share_a_batch_are_refused_by_name() -> None:
    build = idgen.Request.create
    one = build(who=tiny.person(), prompt="x", **tiny.SMALL)
    for name, value in {"steps": 4, "guidance": 2.0, "width": 128, "scheduler": "ddim"}.items():
        with pytest.raises(BadRequest, match=name) as caught:
            tiny.shared("instantid").generate_many([one, one.change(**{name: value})])
        assert caught.value.field == name
    picture = np.zeros((64, 64, 3), np.uint8)
    begun = one.change(image=picture)
    for name, without in (("image", one), ("reference", one), ("mask", begun)):
        with pytest.raises(BadRequest, match=f"all have {name}"):
            tiny.shared("instantid").generate_many([without, without.change(**{name: picture})])


def test_start_latents_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(BadRequest, match="latents have shape"):
        latents("instantid", latents=torch.zeros(1, 4, 9, 9))
