"""The one denoising loop. Every method, text-to-image, image-to-image and inpainting run through :func:`sample`.

Notation follows the papers: x the latents, t the timestep, eps the model's prediction, g the guidance scale.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from idgen.adapters.attention import AttentionBank, AttentionState, Stream
from idgen.adapters.control import ControlRun
from idgen.backbone import Backbone, explain_out_of_memory
from idgen.conditioning import Conditioning, ControlBranch, Start
from idgen.errors import Cancelled
from idgen.preview import preview


@dataclass(frozen=True, eq=False)
class Step:
    """What a callback sees after each step."""

    index: int
    """0-based"""
    total: int
    timestep: int
    latents: Tensor
    """(B, c, h, w) after the step"""
    prediction: Tensor
    """(R, c, h, w) the UNet's raw output; with guidance R = 2 B, the unconditional half first"""
    guided: Tensor
    """(B, c, h, w) the prediction after guidance"""
    residuals: tuple[list[Tensor], Tensor] | None
    """ControlNet residuals of this step (down, mid), summed over the branches, after scaling"""
    clean: Tensor
    """(B, c, h, w) the scheduler's estimate of the final latents where it gives one, else the latents"""
    backbone: Backbone

    def preview(self) -> list[Any]:
        """A small PIL image for each of the B latents, within milliseconds (see :mod:`idgen.preview`)."""
        return preview(self.backbone, self.clean)


Callback = Callable[[Step], object]
"""Called after each step. Returning ``False`` stops the work; the sampler then raises :class:`Cancelled`."""


def seeded_noise(backbone: Backbone, seeds: list[int], height: int, width: int) -> tuple[Tensor, list[torch.Generator]]:
    """Unit Gaussian noise (B, c, h, w), one CPU generator an image, so that a seed means the same picture whatever the
    batch, the number of images and the device. The generators are returned for what is drawn later."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return draw(backbone, generators, height, width), generators


def draw(backbone: Backbone, generators: list[torch.Generator], height: int, width: int) -> Tensor:
    """Noise for one image from each generator, (B, c, h, w)."""
    shape = (1, backbone.latent_channels, height // backbone.vae_factor, width // backbone.vae_factor)
    return torch.cat([torch.randn(shape, generator=g, dtype=torch.float32) for g in generators])


@torch.no_grad()
def sample(
    backbone: Backbone,
    conditioning: Conditioning,
    start: Start,
    scheduler: Any,
    *,
    steps: int,
    guidance: float,
    generators: list[torch.Generator] | None = None,
    callback: Callback | None = None,
    attention: str = "sdpa",
) -> Tensor:
    """Run the loop.

    Args:
        scheduler: a fresh one; see :func:`idgen.schedulers.make_scheduler`.
        guidance: g of classifier-free guidance, eps_u + g (eps_c - eps_u) (arXiv:2207.12598 in Imagen's form); up to
            1 the unconditional half is not computed.
        generators: one an image, for schedulers that add noise at each step.
        attention: see :data:`idgen.adapters.attention.BACKENDS`.
    Returns:
        The final latents (B, c, h, w), scaled as the VAE's encoder scales them.
    Raises:
        Cancelled: the callback returned ``False``. OutOfMemory: names what to lower.
    """
    guided = guidance > 1.0
    device, dtype = backbone.device, backbone.dtype
    unet = conditioning.unet if conditioning.unet is not None else backbone.unet
    x0 = None if start.image is None else start.image.to(device, dtype)
    noise = start.noise.to(device, dtype)
    scheduler.set_timesteps(steps, device=device)
    timesteps = _timesteps(scheduler, steps, start.strength if x0 is not None else 1.0)
    x = (
        noise * scheduler.init_noise_sigma
        if x0 is None
        else scheduler.add_noise(x0, noise, timesteps[:1].expand(len(x0)))
    )
    mask = None if start.mask is None else start.mask.to(device, dtype)
    context, added = _text(conditioning, guided, device, dtype)
    state = _attention_state(conditioning, guided, attention, x)
    options = {"generator": generators} if generators and _takes_generator(scheduler) else {}
    total = len(timesteps)
    with backbone.lock, ExitStack() as stack, explain_out_of_memory():
        bank = stack.enter_context(AttentionBank(unet, state))
        if conditioning.reference is not None:
            _record_reference(unet, bank, conditioning, guided, context, added, device, dtype)
        runs = [
            (branch, stack.enter_context(_control_run(branch, guided, context, attention, device, dtype)))
            for branch in conditioning.branches
            if bool((branch.scale != 0).any())
        ]
        for i, t in enumerate(timesteps):
            for stream, tokens in zip(state.streams, conditioning.streams):
                stream.active = tokens.start <= i / total and (i + 1) / total <= tokens.end
            model_input = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            residuals = _residuals([run for branch, run in runs if branch.keep(i, total)], model_input, t, added)
            extra = {} if residuals is None else {
                "down_block_additional_residuals": residuals[0],
                "mid_block_additional_residual": residuals[1],
            }  # fmt: skip
            eps = unet(model_input, t, context, added_cond_kwargs=added, return_dict=False, **extra)[0]
            if guided:
                unconditional, conditional = eps.chunk(2)
                combined = unconditional + guidance * (conditional - unconditional)
            else:
                combined = eps
            result = scheduler.step(combined, t, x, **options)
            x = result.prev_sample
            clean = getattr(result, "pred_original_sample", None)
            if mask is not None and x0 is not None:
                kept = (
                    x0 if i + 1 == total else scheduler.add_noise(x0, noise, timesteps[i + 1 : i + 2].expand(len(x0)))
                )
                x = mask * x + (1 - mask) * kept
            if callback is not None:
                step = Step(i, total, int(t), x, eps, combined, residuals, x if clean is None else clean, backbone)
                if callback(step) is False:
                    raise Cancelled(f"stopped after step {i + 1} of {total}.")
    return x


def _timesteps(scheduler: Any, steps: int, strength: float) -> Tensor:
    """The last ``int(steps * strength)`` steps, as diffusers' image-to-image pipelines count them."""
    first = max(steps - min(int(steps * strength), steps), 0)
    order = getattr(scheduler, "order", 1)
    if first and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first * order)
    return scheduler.timesteps[first * order :]


def _both(positive: Tensor, negative: Tensor | None, guided: bool, device: Any, dtype: Any) -> Tensor:
    rows = torch.cat([negative, positive]) if guided and negative is not None else positive
    return rows.to(device, dtype)


def _text(conditioning: Conditioning, guided: bool, device: Any, dtype: Any) -> tuple[Tensor, dict[str, Tensor] | None]:
    text = conditioning.text
    context = _both(text.positive, text.negative, guided, device, dtype)
    if text.pooled is None or text.time_ids is None:
        return context, None
    pooled = _both(text.pooled, text.negative_pooled, guided, device, dtype)
    return context, {"text_embeds": pooled, "time_ids": _both(text.time_ids, text.time_ids, guided, device, dtype)}


def _attention_state(conditioning: Conditioning, guided: bool, attention: str, x: Tensor) -> AttentionState:
    streams = []
    for stream in conditioning.streams:
        tokens = _both(stream.positive, stream.negative, guided, x.device, x.dtype)
        scale = stream.scale.repeat(2) if guided else stream.scale
        region = stream.region
        if region is not None:
            region = region.to(x.device, x.dtype)
            region = region.repeat(2, 1, 1, 1) if guided and len(region) > 1 else region
        weights = stream.weights.to(x.device, x.dtype)
        streams.append(Stream(weights, tokens, scale.to(x.device, x.dtype).view(-1, 1, 1), region))
    loras = [lora.to(x.device, x.dtype) for lora in conditioning.loras]
    return AttentionState(streams, loras, attention, aspect=x.shape[-1] / x.shape[-2])


def _control_run(
    branch: ControlBranch, guided: bool, context: Tensor, attention: str, device: Any, dtype: Any
) -> ControlRun:
    """In guess mode the branch acts on the conditional half only (ControlNet repository): 0 elsewhere."""
    twice = (lambda t: torch.cat([t, t])) if guided else (lambda t: t)
    scale = twice(branch.scale).to(device, dtype)
    if branch.guess_mode and guided:
        scale[: len(branch.scale)] = 0
    tokens = context if branch.positive is None else _both(branch.positive, branch.negative, guided, device, dtype)
    image = twice(branch.image).to(device, dtype)
    return ControlRun(branch.model, image, scale, tokens, branch.guess_mode, attention)


def _residuals(
    runs: list[ControlRun], model_input: Tensor, t: Tensor, added: dict[str, Tensor] | None
) -> tuple[list[Tensor], Tensor] | None:
    total: tuple[list[Tensor], Tensor] | None = None
    for run in runs:
        down, mid = run.residuals(model_input, t, added)
        total = (down, mid) if total is None else ([a + b for a, b in zip(total[0], down)], total[1] + mid)
    return total


def _record_reference(
    unet: Any,
    bank: AttentionBank,
    conditioning: Conditioning,
    guided: bool,
    context: Tensor,
    added: dict[str, Tensor] | None,
    device: Any,
    dtype: Any,
) -> None:
    """One pass over the clean reference at t = 0; the loop's conditional rows then also attend to its features."""
    reference = conditioning.reference.to(device, dtype)  # type: ignore[union-attr]
    rows = len(reference)
    bank.state.recording = True
    # Streams hold keys and values for the whole guided batch; this pass has only the conditional rows.
    streams, bank.state.streams = bank.state.streams, []
    late = None if added is None else {name: value[-rows:] for name, value in added.items()}
    unet(reference, torch.zeros((), device=device), context[-rows:], added_cond_kwargs=late)
    bank.state.streams = streams
    bank.state.recording = False
    for processor in bank.processors:
        processor.context = processor.text_kv = None
    bank.state.reference_rows = slice(rows, 2 * rows) if guided else slice(0, rows)


def _takes_generator(scheduler: Any) -> bool:
    import inspect

    return "generator" in inspect.signature(scheduler.step).parameters
