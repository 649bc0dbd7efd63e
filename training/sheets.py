"""Contact sheets and curves as PNG files, with Pillow only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """One image [3, H, W] in 0..1 to PIL."""
    array = (image.detach().float().cpu().permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(array)


def save_sheet(images: Tensor, columns: int, path: str | Path, gap: int = 2) -> None:
    """Lay ``images`` [n, 3, H, W] (0..1) out in rows of ``columns`` and write a PNG."""
    n, _, h, w = images.shape
    rows = math.ceil(n / columns)
    sheet = torch.ones(3, rows * (h + gap) - gap, columns * (w + gap) - gap)
    for i, image in enumerate(images.detach().float().cpu()):
        r, c = divmod(i, columns)
        sheet[:, r * (h + gap) : r * (h + gap) + h, c * (w + gap) : c * (w + gap) + w] = image
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    to_pil(sheet).save(path)


def save_curve(points: Sequence[tuple[float, float]], path: str | Path, title: str) -> None:
    """A plain line plot of (x, y) points: loss or score over samples."""
    width, height, margin = 480, 270, 44
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((margin, 8), title, fill="black")
    if len(points) > 1:
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
        dx, dy = (x1 - x0) or 1.0, (y1 - y0) or 1.0
        at = [
            (margin + (x - x0) / dx * (width - 2 * margin), height - margin - (y - y0) / dy * (height - 2 * margin))
            for x, y in points
        ]
        draw.line(at, fill=(30, 90, 200), width=2)
        draw.text((4, margin - 6), f"{y1:.3g}", fill="black")
        draw.text((4, height - margin - 6), f"{y0:.3g}", fill="black")
        draw.text((margin, height - margin + 8), f"{x0:.3g}", fill="black")
        draw.text((width - margin - 30, height - margin + 8), f"{x1:.3g}", fill="black")
    draw.rectangle((margin, margin, width - margin, height - margin), outline=(180, 180, 180))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
