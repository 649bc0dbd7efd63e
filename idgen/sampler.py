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

from idgen.adapters.backends import choose_backend, facts_of
from idgen.backbone import Backbone, explain_out_of_memory
from idgen.conditioning import Conditioning, Start
from idgen.denoiser import Denoiser
from idgen.errors import BadRequest, Cancelled
from idgen.preview import preview
from idgen.speed import Levers

EXACT = Levers()


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
    attention: str = "auto",
    levers: Levers = EXACT,
) -> Tensor:
    """Run the loop.

    Args:
        scheduler: a fresh one; see :func:`idgen.schedulers.make_scheduler`.
        guidance: g of classifier-free guidance, eps_u + g (eps_c - eps_u) (arXiv:2207.12598 in Imagen's form); up to
            1 the unconditional half is not computed.
        generators: one an image, for schedulers that add noise at each step.
        attention: one of :data:`idgen.adapters.attention.BACKENDS`.
        levers: what to trade for speed; the defaults are exact.
    Returns:
        The final latents (B, c, h, w), scaled as the VAE's encoder scales them.
    Raises:
        Cancelled: the callback returned ``False``. OutOfMemory: names what to lower. BadRequest: the scheduler has no
        so many steps.
    """
    device, dtype = backbone.device, backbone.dtype
    attention, _ = choose_backend(attention, dtype, facts_of(device))
    unet = conditioning.unet if conditioning.unet is not None else backbone.unet
    # Latents stay float32 whatever the networks compute in: dozens of small steps would each be rounded away.
    x0 = None if start.image is None else start.image.to(device, torch.float32)
    noise = start.noise.to(device, torch.float32)
    try:
        scheduler.set_timesteps(steps, device=device)
    except ValueError as error:
        raise BadRequest(f"this scheduler cannot make {steps} steps: {str(error).splitlines()[0]}", "steps") from None
    timesteps = _timesteps(scheduler, steps, start.strength if x0 is not None else 1.0)
    x = (
        noise * scheduler.init_noise_sigma
        if x0 is None
        else scheduler.add_noise(x0, noise, timesteps[:1].expand(len(x0)))
    )
    mask = None if start.mask is None else start.mask.to(device, torch.float32)
    options = {"generator": generators} if generators and _takes_generator(scheduler) else {}
    total = len(timesteps)
    guided, denoise = False, None
    with backbone.lock, ExitStack() as stack, explain_out_of_memory():
        for i, t in enumerate(timesteps):
            if denoise is None or guided != (guidance > 1.0 and levers.guided(i, total)):
                # Where guidance ends the unconditional rows leave the batch, and with them what was kept for them.
                stack.close()
                guided = guidance > 1.0 and levers.guided(i, total)
                like = x.to(dtype)
                denoise = Denoiser(unet, conditioning, like, guided=guided, attention=attention, levers=levers)
                stack.enter_context(denoise)
            eps = denoise(scheduler.scale_model_input(x, t).to(dtype), t, i, total).float()
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
                seen = x if clean is None else clean
                if callback(Step(i, total, int(t), x, eps, combined, denoise.residuals, seen, backbone)) is False:
                    raise Cancelled(f"stopped after step {i + 1} of {total}.")
    return x


def _timesteps(scheduler: Any, steps: int, strength: float) -> Tensor:
    """The last ``int(steps * strength)`` steps, as diffusers' image-to-image pipelines count them; but at least one,
    where diffusers' break."""
    first = steps - max(1, int(steps * strength))
    order = getattr(scheduler, "order", 1)
    if first and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first * order)
    return scheduler.timesteps[first * order :]


def _takes_generator(scheduler: Any) -> bool:
    import inspect

    return "generator" in inspect.signature(scheduler.step).parameters
