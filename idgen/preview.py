"""A cheap look at latents: a linear map from a latent cell to a colour, fitted once to each backbone's own VAE.

Published maps exist for two VAEs only; fitting one takes a second, works for every VAE, and is exact least squares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from idgen.backbone import Backbone


@torch.no_grad()
def fit_preview_map(backbone: Backbone, patches: int = 64) -> Tensor:
    """The (c + 1, 3) least-squares map from latents (with a constant 1 appended) to the mean colour under each cell.

    Fitted on smooth random colour fields, encoded by the backbone's own VAE.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    coarse = torch.rand((max(1, patches // 16), 3, 4, 4), generator=generator)
    side = 16 * backbone.vae_factor
    fields = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    latents = torch.cat([backbone.encode_image(f[None]) for f in fields]).float().cpu()
    colours = F.interpolate(fields, latents.shape[-2:], mode="area")
    x = latents.permute(0, 2, 3, 1).flatten(0, 2)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    return torch.linalg.lstsq(x, colours.permute(0, 2, 3, 1).flatten(0, 2)).solution


def preview(backbone: Backbone, latents: Tensor) -> list[Any]:
    """Latents (B, c, h, w) to B PIL images of (8 w) x (8 h) pixels or the VAE's factor, upscaled smoothly."""
    from PIL import Image

    if backbone.preview_map is None:
        backbone.preview_map = fit_preview_map(backbone)
    x = latents.detach().float().cpu().permute(0, 2, 3, 1)
    colours = x @ backbone.preview_map[:-1] + backbone.preview_map[-1]
    arrays = (colours.nan_to_num(0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    size = (latents.shape[-1] * backbone.vae_factor, latents.shape[-2] * backbone.vae_factor)
    return [Image.fromarray(a).resize(size, Image.Resampling.BICUBIC) for a in arrays]
