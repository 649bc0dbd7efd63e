"""idgen gives the numbers that the original implementations gave, from the same weight files.

``pytest tests/test_parity.py --parity-root DIR`` replays another folder of packs.
"""

from __future__ import annotations

import pytest
import torch

from tests.parity import Case, assert_close, replay


def test_replay_of_the_original_reproduces_every_recorded_number(parity_case: Case) -> None:
    golden = parity_case.tensors
    run = replay(parity_case)
    final, steps = run.run()
    conditioning = run.conditioning()
    first = steps[0]
    samples = parity_case.about.get("num_samples", 1)

    assert [s.timestep for s in steps] == golden["timesteps"].round().long().tolist()
    if "image_tokens" in golden:
        repeated = parity_case.pack == "instantid"
        stream = conditioning.streams[0]
        every = 1 if repeated else samples
        assert_close(stream.positive[::every], golden["image_tokens"], "identity tokens")
        if "uncond_image_tokens" in golden:
            assert_close(stream.negative[::every], golden["uncond_image_tokens"], "unconditional tokens")
    if "added_text_embeds" in golden:
        text = conditioning.text
        halves = [text.pooled] if text.negative_pooled is None else [text.negative_pooled, text.pooled]
        assert_close(torch.cat(halves), golden["added_text_embeds"], "pooled text")
        ids = text.time_ids.repeat(len(halves), 1)
        assert_close(ids, golden["added_time_ids"], "time ids")
    for name, ours in (
        ("prompt_embeds", conditioning.text.positive),
        ("negative_prompt_embeds", conditioning.text.negative),
    ):
        each = parity_case.about.get("num_images_per_prompt", 1) if "id_embedding" in golden else 1
        if name in golden and name == "prompt_embeds":
            assert_close(ours[::each], golden[name], name)
        if f"{name}_first8" in golden:
            recorded = golden[f"{name}_first8"]
            step = len(ours) // len(recorded)
            assert_close(ours[::step, :8], recorded, name)
    if "encoder_hidden_states_step0" in golden:
        text = conditioning.text
        rows = [text.positive] if text.negative is None else [text.negative, text.positive]
        tokens = [s for stream in conditioning.streams for s in (stream.negative, stream.positive)][-len(rows) :]
        context = torch.cat([torch.cat(pair, dim=1) for pair in zip(rows, tokens)]) if tokens else torch.cat(rows)
        assert_close(context, golden["encoder_hidden_states_step0"], "UNet context")
    if "controlnet_mid_step0" in golden and first.residuals is not None:
        assert_close(first.residuals[1], golden["controlnet_mid_step0"], "IdentityNet, middle block")
        for i, ours in enumerate(first.residuals[0]):
            if f"controlnet_down{i}_step0" in golden:
                assert_close(ours, golden[f"controlnet_down{i}_step0"], f"IdentityNet, skip connection {i}")
    if "controlnet_scale_per_step" in golden:
        scale = parity_case.about["controlnet_conditioning_scale"]
        ours = [0.0 if s.residuals is None else scale for s in steps]
        assert ours == pytest.approx(golden["controlnet_scale_per_step"].tolist())
    assert_close(first.prediction, golden["unet_out_step0"], "UNet output of step 0")
    assert_close(first.guided, golden["noise_pred_guided_step0"], "guided prediction of step 0")
    each_step = torch.stack([s.latents[0] for s in steps])
    assert_close(each_step, golden["latents_steps_sample0"], "latents of sample 0 after every step")
    assert_close(final, golden["latents_final"], "final latents")
    if "image_f32" in golden:
        decoded = run.pipeline.backbone.decode(final)
        assert (decoded - golden["image_f32"]).abs().max() <= 1e-4, "decoded image"
    if "image_f32" in golden or "image0_u8" in golden:
        images = run.images()
        if "image0_u8" in golden:
            assert (images[0].int() - golden["image0_u8"][0].int()).abs().max() <= 1, "8-bit image of sample 0"
