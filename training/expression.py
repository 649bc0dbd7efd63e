"""A small network that reads the expression off an aligned face crop: the generator's teacher for faces.

Brows and the corners of a mouth fill a few pixels of a picture and next to nothing of its latents, where the latent
reader reads 7 of 10 expressions; on a crop nearly all can be read. It is another network, with other crops and another
seed, than the attribute reader that judges the portraits (``benchmarks/mini_quality.py``).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .facedata import FaceSet, align, jitter_keypoints
from .heads import EXPRESSIONS
from .loop import Loop
from .recogniser import Residual, augment


class ExpressionReader(nn.Module):
    """Aligned crops [n, 3, 112, 112] in -1..1 -> logits [n, 7] over ``heads.EXPRESSIONS``."""

    def __init__(self, widths: tuple[int, int, int, int] = (20, 32, 64, 96)) -> None:
        super().__init__()
        a, b, c, d = widths
        self.body = nn.Sequential(
            nn.Conv2d(3, a, 5, 2, 2, bias=False), nn.BatchNorm2d(a), nn.ReLU(),
            Residual(a, b, 2), Residual(b, b, 1), Residual(b, c, 2), Residual(c, c, 1), Residual(c, d, 2),
        )  # fmt: skip
        self.hidden = nn.Linear(49 * d, 128)
        self.out = nn.Linear(128, len(EXPRESSIONS))

    def forward(self, crops: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(self.body(crops).flatten(1)))).float()


def train(
    faces: FaceSet, held_out: FaceSet, root: Path, minutes: float, *, device: str = "cpu", batch: int = 64
) -> ExpressionReader:
    """Train for so many minutes; resumable by ``root / expression``. Returns the averaged network in eval mode."""
    torch.manual_seed(61)
    reader = ExpressionReader().to(device).to(memory_format=torch.channels_last)
    expression = faces.attributes["expression"]

    @torch.no_grad()
    def look() -> dict[str, float]:
        reader.eval()
        state = torch.get_rng_state()
        torch.manual_seed(3)
        crops = align(held_out.images.float(), jitter_keypoints(held_out.keypoints))
        right = torch.cat([reader(c.to(device)).argmax(1).cpu() for c in crops.split(128)])
        torch.set_rng_state(state)
        reader.train()
        return {"held_out_right": float((right == held_out.attributes["expression"]).float().mean())}

    loop = Loop(
        "expression", root, {"reader": reader}, minutes, rate=2e-3, decay=0.7, averaging=0.99, on_save=look,
        save_every=60,
    )  # fmt: skip
    while loop.going:
        rows = torch.randint(0, len(faces), (batch,))
        crops = align(faces.images[rows].to(device).float(), jitter_keypoints(faces.keypoints[rows]).to(device))
        crops = augment(crops).contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            scores = reader(crops)
        loop.update(F.cross_entropy(scores.float(), expression[rows].to(device)), batch)
    loop.finish()
    recalibrate(reader, faces, device)
    return reader.eval().requires_grad_(False)


@torch.no_grad()
def recalibrate(reader: ExpressionReader, faces: FaceSet, device: str, batches: int = 30) -> None:
    """Batch norms' means and variances of the averaged weights, which the loop does not average."""
    norms = [m for m in reader.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    reader.train()
    for _ in range(batches):
        rows = torch.randint(0, len(faces), (128,))
        reader(augment(align(faces.images[rows].to(device).float(), faces.keypoints[rows].to(device))))


def load_expression_reader(path: Path, device: torch.device | str = "cpu") -> ExpressionReader:
    """The frozen network of a checkpoint, in eval mode."""
    reader = ExpressionReader()
    reader.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return reader.to(device).eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
