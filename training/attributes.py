"""A small network that reads a picture's attributes: colours, glasses, hat, expression, pose, light and style.

It judges whether generated portraits obey their prompts (``benchmarks/mini_quality.py``); no part of idgen runs it. It
learns from renders alone, blurred and noisy ones too, since generated pictures are softer than rendered ones.

    python -m idgen.training.attributes runs/mini/shards --out benchmarks/mini_attributes.safetensors --minutes 10
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .facedata import FaceSet
from .heads import ATTRIBUTES, STYLES
from .optim import Optimiser
from .workers import Workers

SIDE = 128
"""Pixels of the pictures it reads."""
_COLOURLESS = tuple(STYLES.index(s) for s in ("sketch", "statue"))


def visible(attributes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which attributes show in each picture, bool [n] by name: a sketch has no colours, no hat has no colour."""
    style = attributes["style"]
    coloured = torch.stack([style != s for s in _COLOURLESS]).all(0)
    always = torch.ones_like(coloured)
    shown = dict.fromkeys(ATTRIBUTES, always)
    shown["shirt"] = coloured
    shown["background"] = style != STYLES.index("sketch")
    shown["hat_colour"] = coloured & (attributes["hat"] == 1)
    shown["light"] = style == STYLES.index("photo")
    return shown


class AttributeReader(nn.Module):
    """Images [n, 3, 128, 128] in 0..1 -> logits [n, classes] by attribute name."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for out, stride in ((24, 2), (40, 2), (40, 1), (72, 2), (72, 1), (112, 2), (112, 1), (128, 2)):
            kernel = 5 if width == 3 else 3
            layers += [nn.Conv2d(width, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(width * 16, 160)
        self.drop = nn.Dropout(0.2)
        self.heads = nn.Linear(160, sum(len(v) for v in ATTRIBUTES.values()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = F.relu(self.hidden(self.features(images * 2 - 1).float().flatten(1)))
        parts = self.heads(self.drop(hidden)).split([len(v) for v in ATTRIBUTES.values()], 1)
        return dict(zip(ATTRIBUTES, parts))

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Class indices [n] by attribute name."""
        self.eval()
        parts = [{k: v.argmax(1) for k, v in self(i.float()).items()} for i in images.split(64)]
        return {k: torch.cat([p[k] for p in parts]) for k in ATTRIBUTES}


def _augment(images: Tensor) -> Tensor:
    """Soften, shift by up to four pixels, change exposure a little, add noise: images [n, 3, S, S] in 0..1."""
    n, side = len(images), images.shape[-1]
    pick = torch.rand(n, device=images.device)[:, None, None, None]
    mean = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    small = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear")
    images = torch.where(pick < 0.3, mean, torch.where(pick < 0.45, small, images))
    padded = F.pad(images, (4, 4, 4, 4), mode="replicate")
    top, left = (int(torch.randint(0, 9, ())) for _ in range(2))
    images = padded[:, :, top : top + side, left : left + side]
    gain = 1 + 0.1 * (torch.rand(n, 1, 1, 1, device=images.device) - 0.5)
    noise = 0.04 * torch.rand(n, 1, 1, 1, device=images.device) * torch.randn_like(images)
    return (images * gain + noise).clamp(0, 1)


def train(
    faces: FaceSet, minutes: float = 10.0, out: Path | None = None, seed: int = 5, rate: float = 2e-3, batch: int = 64,
    device: str = "cpu",
) -> AttributeReader:  # fmt: skip
    """Train for so many minutes, write the weights (half precision, safetensors) to ``out``, return it in eval mode."""
    torch.manual_seed(seed)
    net = AttributeReader().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = Optimiser(net.parameters(), Workers(), weight_decay=0.05, clip=10.0)
    begun, step, mean = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - begun) / (60 * minutes)) < 1:
        pick = torch.randint(0, len(faces), (batch,))
        truth = {k: v[pick].to(device) for k, v in faces.attributes.items()}
        shown = visible(truth)
        images = _augment(faces.images[pick].to(device).float() / 255)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = net(images.contiguous(memory_format=torch.channels_last))
        loss = torch.zeros((), device=device)
        for name, values in logits.items():
            weight = shown[name].float()
            cost = F.cross_entropy(values.float(), truth[name], reduction="none")
            loss = loss + (cost * weight).sum() / weight.sum().clamp(min=1)
        net.zero_grad()
        loss.backward()
        optimiser.step(rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-6)
        step += 1
        mean += (loss.item() - mean) * max(0.02, 1 / step)
        if step % 100 == 0:
            spent = time.monotonic() - begun
            print(f"attributes step {step}  {spent:.0f} s  {spent / step:.3f} s/step  loss {mean:.3f}", flush=True)
    if out is not None:
        save(net, out)
    return net.eval()


def save(net: AttributeReader, out: Path) -> None:
    """Half-precision safetensors."""
    from safetensors.torch import save_file

    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().half().contiguous() for k, v in net.state_dict().items() if v.ndim}, str(out))


def load_reader(path: str | Path) -> AttributeReader:
    """The reader that :func:`train` wrote, in eval mode."""
    from safetensors.torch import load_file

    net = AttributeReader()
    # Batch norms count their batches in scalars that nothing needs and that :func:`save` leaves out.
    net.load_state_dict({k: v.float() for k, v in load_file(str(path)).items()}, strict=False)
    return net.eval()


def accuracy(net: AttributeReader, faces: FaceSet, only_photos: bool = False) -> dict[str, float]:
    """Share of visible attributes read right, by name, on renders."""
    rows = (faces.attributes["style"] == 0).nonzero().flatten() if only_photos else torch.arange(len(faces))
    truth = {k: v[rows] for k, v in faces.attributes.items()}
    shown = visible(truth)
    found = net.read(faces.images[rows].float() / 255) if len(rows) < 20000 else {}
    return {k: float((found[k] == truth[k])[shown[k]].float().mean()) for k in found if shown[k].any()}


def main() -> None:
    """Command line: train the reader and print its accuracy on the validation people."""
    parser = argparse.ArgumentParser(description="Train the reader of a picture's attributes.")
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--limit", type=int, help="use only so many shards")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    net = train(FaceSet.read(o.shards, "train", o.limit), o.minutes, o.out, o.seed, device=o.device)
    faces = FaceSet.read(o.shards, "validation")
    for only_photos in (False, True):
        found = accuracy(net, faces, only_photos)
        print("photo style" if only_photos else "all styles", "  ".join(f"{k} {v:.3f}" for k, v in found.items()))


if __name__ == "__main__":
    main()
