"""mini's InstantID: a resampler from the raw embedding, and IdentityNet, a ControlNet over the five drawn keypoints.

The resampler is taught to say what the FaceID projector says, so it needs no diffusion and shares its key and value
projections. IdentityNet starts as a copy of the UNet's encoder and is trained with everything else frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.controlnets.controlnet import ControlNetModel
from torch import Tensor, nn

from idgen.adapters.projections import HEAD_WIDTH, Resampler
from idgen.keypoints import draw_keypoints

from .attention import attach_plain, attention_names
from .backbone import CONTEXT, SIZE, time_ids
from .data import PER_PERSON
from .generator import DROP_BOTH, DROP_CAPTION, Generator, Noise, sample, sheet_prompts, times
from .latents import LatentSet
from .loop import Loop
from .projector import EMBEDDING, TOKENS, FaceIdProjector
from .prompter import Prompter
from .sheets import save_sheet
from .text import TextEncoders
from .workers import Workers

CONTROL_CHANNELS = (16, 32, 64, 96)


def build_resampler() -> Resampler:
    """InstantID's ``image_proj``: raw embedding [n, 1, 512] -> tokens [n, TOKENS, CONTEXT]."""
    model = Resampler(TOKENS, EMBEDDING, CONTEXT, CONTEXT // HEAD_WIDTH, 2, 4 * CONTEXT, CONTEXT)
    nn.init.normal_(model.latents, std=CONTEXT**-0.5)
    return model


def train_resampler(
    data: LatentSet,
    held_out: LatentSet,
    projector: FaceIdProjector,
    root: Path,
    minutes: float,
    *,
    device: str = "cpu",
    batch: int = 128,
    rate: float = 2e-3,
) -> Resampler:
    """Distil the projector (unit embedding) into a resampler (raw embedding)."""
    torch.manual_seed(71)
    model = build_resampler().to(device)
    projector = projector.to(device).eval().requires_grad_(False)
    photos = data.photo.nonzero().flatten()

    def miss(source: LatentSet, rows: Tensor, noise: float) -> Tensor:
        raw = source.embeddings[rows].float().to(device)
        # Fused and mixed identities lie between people: teach those too.
        share = torch.rand(len(raw), 1, device=device) * (torch.rand(len(raw), 1, device=device) < 0.3)
        raw = raw + share * (raw.flip(0) - raw)
        raw = raw + noise * torch.randn_like(raw)
        raw = raw * (torch.rand(len(raw), 1, device=device) > 0.05)
        return (model(raw[:, None]) - projector(F.normalize(raw, dim=1))).pow(2).mean()

    def look() -> dict[str, float]:
        return {"held_out": float(miss(held_out, held_out.photo.nonzero().flatten()[:512], 0.0))}

    loop = Loop(
        "resampler", root, {"model": model}, minutes, rate=rate, decay=0.8, averaging=0.995, on_save=look, save_every=60
    )
    while loop.going:
        loop.update(miss(data, photos[torch.randint(0, len(photos), (batch,))], 0.15), batch)
    loop.finish()
    return model.eval()


def build_identity_net(generator: Generator) -> ControlNetModel:
    """A ControlNet from the UNet whose encoder tokens are identity tokens: its keys and values come from the
    adapter.
    """
    net = ControlNetModel.from_unet(
        generator.unet, conditioning_channels=3, controlnet_conditioning_channel_order="rgb"
    )
    small = ControlNetModel.from_config({**net.config, "conditioning_embedding_out_channels": CONTROL_CHANNELS})
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("controlnet_cond_embedding.")}
    small.load_state_dict(state, strict=False)
    for i, name in enumerate(attention_names(generator.unet)):
        if name.endswith("attn2") and not name.startswith("up_blocks"):
            attn: Any = small.get_submodule(name)
            pair: Any = generator.keys.layers[str(i)]
            attn.to_k.load_state_dict(pair["to_k_ip"].state_dict())
            attn.to_v.load_state_dict(pair["to_v_ip"].state_dict())
    # A control signal that starts at exactly zero twice (embedding and residuals) is learned late.
    nn.init.normal_(small.controlnet_cond_embedding.conv_out.weight, std=0.02)
    attach_plain(small)
    return small


def drawings(keypoints: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Keypoints [n, 5, 2] in pixels of a 128 px picture -> control images [n, 3, 128, 128] in 0..1."""
    arrays = [np.asarray(draw_keypoints((SIZE, SIZE), k)) for k in keypoints.float().numpy()]
    return torch.from_numpy(np.stack(arrays)).to(device).permute(0, 3, 1, 2).float() / 255


def residuals(
    net: ControlNetModel, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor, control: Tensor, scale: float = 1.0
) -> dict[str, object]:
    """IdentityNet's residuals as the UNet's extra arguments."""
    down, mid = net(
        x,
        t,
        encoder_hidden_states=tokens,
        controlnet_cond=control,
        conditioning_scale=scale,
        return_dict=False,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids(len(x), x.device)},
    )
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


class Controlled(nn.Module):
    """Generator with IdentityNet, called like the generator by :func:`sample`; the control images are set
    beforehand.
    """

    def __init__(self, generator: Generator, net: ControlNetModel) -> None:
        super().__init__()
        self.generator, self.net = generator, net
        self.control: Tensor | None = None

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, tokens: Tensor, scale: float = 1.0
    ) -> Tensor:
        assert self.control is not None
        control = self.control if len(self.control) == len(x) else torch.cat([self.control, self.control])
        extra = residuals(self.net, x, t, tokens, pooled, control)
        return self.generator(x, t, context, pooled, tokens, scale, **extra)


def train_identity_net(
    data: LatentSet,
    held_out: LatentSet,
    text: TextEncoders,
    generator: Generator,
    resampler: Resampler,
    vae: AutoencoderTiny,
    root: Path,
    minutes: float,
    *,
    device: str = "cpu",
    workers: Workers | None = None,
    batch: int = 24,
    rate: float = 2e-3,
    save_every: float = 150.0,
    name: str = "identity_net",
) -> ControlNetModel:
    """Train IdentityNet on photos and drawings alike; generator and resampler stay as they are."""
    workers = workers or Workers()
    torch.manual_seed(81)
    generator = generator.to(device).eval().requires_grad_(False)
    resampler = resampler.to(device).eval().requires_grad_(False)
    net = build_identity_net(generator).train()
    net.to(device, memory_format=torch.channels_last)  # type: ignore[arg-type]  # diffusers' wrapper hides that this is a method
    model = Controlled(generator, net)
    prompter, noise = Prompter(text.to(device), device, seed=workers.rank), Noise(device)

    def look() -> dict[str, float]:
        net.eval()
        people = torch.arange(6) % (len(held_out) // PER_PERSON)
        rows = people * PER_PERSON + 1 + torch.arange(6)
        refs = held_out.embeddings[people * PER_PERSON].float().to(device)
        each = torch.arange(6).repeat_interleave(3)
        prompts = [sheet_prompts()[k] for k in (0, 2, 3)] * 6
        model.control = drawings(held_out.keypoints[rows][each], device)
        z = sample(
            model, prompter, prompts, resampler(refs[each][:, None]), resampler(torch.zeros(1, 1, 512, device=device))
        )
        out = vae.decode(z).sample.float().clamp(-1, 1) / 2 + 0.5
        grid = torch.stack([model.control, out], 1).flatten(0, 1)
        save_sheet(grid, 6, root / f"{name}.sheet.png")
        state = torch.get_rng_state()
        torch.manual_seed(3)
        some = torch.arange(48) * 7 % len(held_out)
        x, target, _, _ = noise.add(held_out.latents[some].to(device).float(), torch.full((48,), 800, device=device))
        tokens = resampler(held_out.references(some, raw=True).to(device)[:, None])
        context, pooled = prompter(["a photo of a person"] * 48)
        error = []
        for points in (held_out.keypoints[some], held_out.keypoints[some].roll(5, 0)):
            model.control = drawings(points, device)
            v = model(x, torch.full((48,), 800, device=device), context, pooled, tokens)
            error.append(float((v - target).pow(2).mean()))
        torch.set_rng_state(state)
        net.train()
        return {"error": error[0], "keypoint_gap": error[1] - error[0]}

    loop = Loop(
        name,
        root,
        {"net": net},
        minutes,
        rate=rate,
        workers=workers,
        decay=0.6,
        averaging=0.995,
        on_save=look,
        save_every=save_every,
    )
    torch.manual_seed(20_000 + 97 * loop.steps + workers.rank)
    prompter.rng.seed(20_000 + 97 * loop.steps + workers.rank)
    while loop.going:
        b = data.batch(batch, device, 1.0)
        chance = torch.rand(batch)
        keep = (chance >= DROP_BOTH).float()[:, None]
        context, pooled, _ = prompter.speak(data.labels, b.rows, chance < DROP_BOTH + DROP_CAPTION)
        # Late times are where the place of the face is decided.
        t = torch.maximum(times(batch, 0.0, device), torch.randint(0, 1000, (batch,), device=device))
        x, target, _, _ = noise.add(b.latents, t)
        tokens = resampler((data.references(b.rows, raw=True) * keep).to(device)[:, None])
        model.control = drawings(data.keypoints[b.rows], device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            v = model(x, t, context, pooled, tokens)
        loop.update(((v - target).pow(2) * b.weights).mean(), batch)
    loop.finish()
    return net.eval()
