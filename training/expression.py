"""A small network that reads the expression off an aligned face crop.

Brows and the corners of a mouth fill a few pixels of a picture and next to nothing of its latents, where the latent
reader reads 7 of 10 expressions; on a crop nearly all can be read. One of these teaches the generator
(:mod:`.face_teacher`); another one, of other widths, another seed and other people, judges the portraits in
``benchmarks/mini_quality.py``. The judge is made by

    python -m idgen.training.expression runs/mini/shards --out benchmarks/mini_expression.safetensors --minutes 6
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import PER_PERSON, SHARD_PEOPLE
from .facedata import FaceSet, align, jitter_keypoints
from .heads import EXPRESSIONS
from .loop import Loop
from .recogniser import Residual, augment

TEACHER, JUDGE = (20, 32, 64, 96), (28, 40, 56, 80)
"""Widths of the two networks."""
TEACHER_SHARDS = 45
"""The teacher learns from the first shards, the judge from the others."""


class ExpressionReader(nn.Module):
    """Aligned crops [n, 3, 112, 112] in -1..1 -> logits [n, 7] over ``heads.EXPRESSIONS``."""

    def __init__(self, widths: tuple[int, int, int, int] = TEACHER) -> None:
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
    faces: FaceSet,
    held_out: FaceSet,
    root: Path,
    minutes: float,
    *,
    device: str = "cpu",
    batch: int = 64,
    name: str = "expression",
    widths: tuple[int, int, int, int] = TEACHER,
    seed: int = 61,
    first: int = 0,
) -> ExpressionReader:
    """Train on the rows of ``faces`` from ``first`` on; resumable by ``root / name``. Returns the averaged network in
    eval mode."""
    torch.manual_seed(seed)
    reader = ExpressionReader(widths).to(device)
    reader.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
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
        name, root, {"reader": reader}, minutes, rate=2e-3, decay=0.7, averaging=0.99, on_save=look,
        save_every=60,
    )  # fmt: skip
    while loop.going:
        rows = torch.randint(first, len(faces), (batch,))
        crops = align(faces.images[rows].to(device).float(), jitter_keypoints(faces.keypoints[rows]).to(device))
        crops = augment(crops).contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            scores = reader(crops)
        loop.update(F.cross_entropy(scores.float(), expression[rows].to(device)), batch)
    loop.finish()
    recalibrate(reader, faces, device, first)
    return reader.eval().requires_grad_(False)


@torch.no_grad()
def recalibrate(reader: ExpressionReader, faces: FaceSet, device: str, first: int, batches: int = 30) -> None:
    """Batch norms' means and variances of the averaged weights, which the loop does not average."""
    norms = [m for m in reader.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    reader.train()
    for _ in range(batches):
        rows = torch.randint(first, len(faces), (128,))
        reader(augment(align(faces.images[rows].to(device).float(), faces.keypoints[rows].to(device))))


def load_expression_reader(path: Path, device: torch.device | str = "cpu") -> ExpressionReader:
    """The frozen teacher of a checkpoint, in eval mode."""
    return _ready(ExpressionReader(TEACHER), torch.load(path, map_location="cpu", weights_only=True)).to(device)


def load_judge(path: Path) -> ExpressionReader:
    """The frozen judge of a safetensors file, in eval mode."""
    from safetensors.torch import load_file

    return _ready(ExpressionReader(JUDGE), {k: v.float() for k, v in load_file(str(path)).items()})


def _ready(reader: ExpressionReader, state: dict[str, Tensor]) -> ExpressionReader:
    # Batch norms count their batches in scalars that nothing needs and that a judge's file leaves out.
    missing = reader.load_state_dict(state, strict=False).missing_keys
    if any(not key.endswith("num_batches_tracked") for key in missing):
        raise ValueError(f"this file is no expression reader of these widths: it lacks {', '.join(missing)}")
    return reader.eval().requires_grad_(False)


def main() -> None:
    """Command line: train the judge and print how well it reads the validation people."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description="Train the judge of expressions.")
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args()
    held_out = FaceSet.read(o.shards, "validation")
    faces = FaceSet.read(o.shards, "train")
    first = TEACHER_SHARDS * SHARD_PEOPLE * PER_PERSON
    judge = train(
        faces, held_out, o.shards.parent, o.minutes,
        device=o.device, name="expression_judge", widths=JUDGE, seed=62, first=first,
    )  # fmt: skip
    save_file({k: v.cpu().half().contiguous() for k, v in judge.state_dict().items() if v.ndim}, str(o.out))


if __name__ == "__main__":
    main()
