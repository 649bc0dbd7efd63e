"""Screen-space styles over a finished render: pencil sketch, comic, oil painting. (The statue is a material.)"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import ramp


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    p = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return p[:, :, 1:-1, 2:] - p[:, :, 1:-1, :-2], p[:, :, 2:, 1:-1] - p[:, :, :-2, 1:-1]


def _lines(images: Tensor, geometry: Tensor) -> Tensor:
    """Strength of drawn lines [n, 1, S, S] from jumps of normals, depth, parts and brightness."""
    gx, gy = _gradient(geometry)
    weight = images.new_tensor([0.5, 0.5, 0.5, 1.5, 1.0, 1.0]).view(1, 6, 1, 1)
    edge = ((gx**2 + gy**2) * weight).sum(1, keepdim=True).sqrt()
    bx, by = _gradient(images.mean(1, keepdim=True))
    return (ramp(0.35, 1.1, edge) + ramp(0.10, 0.35, (bx**2 + by**2).sqrt())).clamp(0, 1)


def sketch(images: Tensor, geometry: Tensor, alpha: Tensor) -> Tensor:
    """Pencil on warm paper: contour lines and two layers of hatching."""
    size = images.shape[-1]
    at = (torch.arange(size, device=images.device) + 0.5) / size * 128 - 64
    hatch = 0.5 + 0.5 * torch.sin((at[None, :] + at[:, None]) * 0.55)
    tone = images.mean(1, keepdim=True)
    shade = ramp(0.8, 0.35, tone) * (0.14 + 0.14 * hatch) + ramp(0.5, 0.15, tone) * 0.22
    paper = images.new_tensor([1.0, 0.985, 0.95]).view(1, 3, 1, 1)
    return (0.97 - 0.55 * _lines(images, geometry) - alpha * shade).clamp(0, 1) * paper


def comic(images: Tensor, geometry: Tensor) -> Tensor:
    """Posterised, saturated colours with black outlines."""
    levels = 4.0
    flat = (images * levels).floor() / levels + 0.5 / levels + 0.25 / levels * ((images * levels).frac() > 0.85)
    grey = flat.mean(1, keepdim=True)
    flat = (flat - grey) * 1.35 + grey
    return (flat * (1 - 0.9 * ramp(0.25, 0.8, _lines(images, geometry)))).clamp(0, 1)


def painting(images: Tensor) -> Tensor:
    """Kuwahara filter with four quadrants (the flattest neighbour window wins), more saturation, a canvas texture."""
    size = images.shape[-1]
    k = size // 64 * 2 + 1
    p = k // 2
    padded = F.pad(images, (p * 2,) * 4, mode="replicate")
    mean, square = F.avg_pool2d(padded, k, 1), F.avg_pool2d(padded * padded, k, 1)
    variance = (square - mean * mean).sum(1, keepdim=True)
    corners = [(0, 0), (0, 2 * p), (2 * p, 0), (2 * p, 2 * p)]
    means = torch.stack([mean[:, :, a : a + size, b : b + size] for a, b in corners])
    spread = torch.stack([variance[:, :, a : a + size, b : b + size] for a, b in corners])
    out = (means * torch.softmax(-spread * 3000, 0)).sum(0)
    out = (out - 0.5) * 1.1 + 0.5
    grey = out.mean(1, keepdim=True)
    out = grey + (out - grey) * 1.35
    at = (torch.arange(size, device=images.device) + 0.5) / size * 2 - 1
    x, y = at[None, :], -at[:, None]
    canvas = torch.sin(x * 62 + 4 * torch.sin(y * 9)) * torch.sin(y * 50 + 3 * torch.sin(x * 8))
    return (out + 0.02 * canvas).clamp(0, 1)
