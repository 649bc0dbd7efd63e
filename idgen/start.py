"""Where the sampler begins: seeded noise, or the noised latents of a picture of which a mask may keep a part."""

from __future__ import annotations

import torch
from torch import Tensor

from idgen.backbone import Backbone
from idgen.conditioning import Start
from idgen.errors import BadRequest
from idgen.method import Order
from idgen.pictures import mask_of, pixels_of
from idgen.sampler import draw, seeded_noise


def start_of(backbone: Backbone, orders: list[Order], latents: Tensor | None) -> tuple[Start, list[torch.Generator]]:
    """Where a run begins, and one generator an image for what is drawn later.

    Args:
        orders: of one size; all start from an image, or none.
        latents: start noise (B, c, h, w) instead of seeded noise.
    Raises:
        BadRequest: the latents have another shape. BadImage: a start picture or a mask cannot be read.
    """
    height, width = orders[0].height, orders[0].width
    seeds = [seed for order in orders for seed in order.seeds]
    shape = (
        len(seeds),
        backbone.latent_channels,
        height // backbone.vae_factor,
        width // backbone.vae_factor,
    )
    if latents is not None and tuple(latents.shape) != shape:
        raise BadRequest(f"latents have shape {tuple(latents.shape)}, this request needs {shape}.", "latents")
    if orders[0].request.image is None:
        noise, generators = seeded_noise(backbone, seeds, height, width)
        return Start(noise if latents is None else latents), generators
    request = orders[0].request
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    # The posterior is sampled before the noise is drawn, in diffusers' order, so that seeds agree with it.
    encoded, masks, begin = [], [], 0
    for order in orders:
        count = len(order.seeds)
        pixels = pixels_of(order.request.image, width, height)
        encoded.append(backbone.encode_image(pixels, generators[begin : begin + count]))
        if order.request.mask is not None:
            masks.append(mask_of(order.request.mask, shape[-1], shape[-2]).expand(count, -1, -1, -1))
        begin += count
    mask = torch.cat(masks) if masks else None
    noise = latents if latents is not None else draw(backbone, generators, height, width)
    return Start(noise, torch.cat(encoded), request.strength, mask), generators
