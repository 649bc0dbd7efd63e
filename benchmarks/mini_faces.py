"""How well mini's face detector sees people it has never seen: recall, false faces and keypoint error by circumstance.

    python benchmarks/mini_faces.py                                   # the shipped one, about two minutes
    python benchmarks/mini_faces.py --against older.onnx              # beside another one, on the same pictures

Each picture is looked at once at 128, 256 and 640 pixels through insightface's SCRFD, as idgen does it, at the usual
threshold of .5. Heads are renders of the validation people on synthetic clutter. A head is found when a face's five
keypoints lie around its centre; whatever else is found is a false face. Keypoint errors are in pixels of a portrait of
128, in which a head is about 70 pixels high. Writes a table to benchmarks/results/mini_faces.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from insightface.model_zoo import get_model
from torch import Tensor

from idgen.training.facedata import FaceSet
from idgen.training.heads import STYLES
from idgen.training.scenes import Clutter

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "weights" / "mini" / "faces" / "mini" / "detector.onnx"
SHARDS = HERE.parent / "runs" / "mini" / "shards"
SIZES = (128, 256, 640)
SIDE = 128
"""Pixels of a render."""


@dataclass
class Picture:
    """An image [3, H, W] in 0..1 and its heads: keypoints [n, 5, 2] in pixels, scale [n] in pixels per render pixel."""

    image: Tensor
    keypoints: Tensor = field(default_factory=lambda: torch.zeros(0, 5, 2))
    scales: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class Score:
    """Counts and errors over the pictures of one circumstance at one size."""

    pictures: int = 0
    heads: int = 0
    found: int = 0
    false: int = 0
    errors: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        recall = f"{100 * self.found / self.heads:.0f} %" if self.heads else ""
        error = f"{np.mean(self.errors):.2f}" if self.errors else ""
        return f"{recall} | {self.false} | {error}"


class Pictures:
    """Makes the pictures of each circumstance, the same ones for the same seed."""

    def __init__(self, faces: FaceSet, seed: int = 1) -> None:
        torch.manual_seed(seed)
        self.faces, self.clutter = faces, Clutter(faces)

    def pick(self, n: int, style: str = "photo") -> list[int]:
        """Renders in a style, evenly over the people."""
        rows = (self.faces.style == STYLES.index(style)).nonzero().flatten()
        return rows[torch.linspace(0, len(rows) - 1, n).long()].tolist()

    def portrait(self, row: int) -> Picture:
        """A render as it is."""
        return Picture(self.faces.images[row].float() / 255, self.faces.keypoints[row][None], torch.ones(1))

    def portraits(self, n: int, style: str = "photo") -> Iterator[Picture]:
        """Renders of a style."""
        yield from map(self.portrait, self.pick(n, style))

    def blurred(self, n: int) -> Iterator[Picture]:
        """Portraits that have been only 32 pixels large."""
        for p in self.portraits(n):
            small = F.avg_pool2d(p.image[None], 4)
            yield Picture(F.interpolate(small, size=SIDE, mode="bilinear")[0], p.keypoints, p.scales)

    def noisy(self, n: int) -> Iterator[Picture]:
        """Dark, grainy portraits."""
        for p in self.portraits(n):
            grain = 0.08 * torch.randn_like(p.image)
            yield Picture((0.5 * p.image + grain).clamp(0, 1), p.keypoints, p.scales)

    def covered(self, n: int) -> Iterator[Picture]:
        """Portraits with a third of the head behind something, from each of the four sides in turn."""
        for i, row in enumerate(self.pick(n)):
            p, (x0, y0, x1, y1) = self.portrait(row), self.faces.boxes[row].tolist()
            wide, high = (x1 - x0) / 3, (y1 - y0) / 3
            x0, x1 = (x0, x0 + wide) if i % 4 == 0 else (x1 - wide, x1) if i % 4 == 1 else (x0, x1)
            y0, y1 = (y0, y0 + high) if i % 4 == 2 else (y1 - high, y1) if i % 4 == 3 else (y0, y1)
            part = slice(max(0, round(y0)), round(y1)), slice(max(0, round(x0)), round(x1))
            p.image[:, part[0], part[1]] = self.clutter.draw(1, SIDE)[0][:, part[0], part[1]]
            yield p

    def several(self, n: int) -> Iterator[Picture]:
        """Four people of different sizes in a cluttered picture of 512 pixels."""
        rows = self.pick(4 * n)
        for i in range(n):
            places = [(256 * (k % 2), 256 * (k // 2), (256, 192, 128, 96)[(i + k) % 4]) for k in range(4)]
            yield self.pasted(512, list(zip(rows[4 * i : 4 * i + 4], places)))

    def photo(self, n: int, head: int) -> Iterator[Picture]:
        """One person with a head of so many pixels somewhere in a cluttered photo of 1024."""
        for row in self.pick(n):
            box = self.faces.boxes[row]
            side = round(head * SIDE / float((box[2:] - box[:2]).max()))
            # The photo's border may cut shoulders and hair away, never the head.
            low = (-box[:2] * side / SIDE).clamp(max=0) if side > 1024 else torch.zeros(2)
            room = 1024 - box[2:] * side / SIDE if side > 1024 else torch.full((2,), 1024.0 - side)
            x, y = (low + torch.rand(2) * (room - low)).round().long().tolist()
            yield self.pasted(1024, [(row, (x, y, side))])

    def nobody(self, n: int) -> Iterator[Picture]:
        """Clutter, hair and hats, shuffled pieces of faces."""
        yield from (Picture(image) for image in self.clutter.draw(n, 256))

    def pasted(self, size: int, heads: list[tuple[int, tuple[int, int, int]]]) -> Picture:
        """Renders laid on clutter: rows with (x, y, side) in pixels."""
        image = self.clutter.draw(1, size)[0]
        keypoints, scales = [], []
        for row, (x, y, side) in heads:
            p = self.portrait(row)
            patch = F.interpolate(p.image[None], size=side, mode="bilinear", antialias=True)[0]
            top, left = max(0, -y), max(0, -x)
            patch = patch[:, top : size - y, left : size - x]
            image[:, y + top : y + top + patch.shape[1], x + left : x + left + patch.shape[2]] = patch
            keypoints.append(p.keypoints[0] * side / SIDE + torch.tensor([x, y]))
            scales.append(side / SIDE)
        return Picture(image, torch.stack(keypoints), torch.tensor(scales))


def circumstances(pictures: Pictures, n: int) -> dict[str, Callable[[], Iterator[Picture]]]:
    """Name of each circumstance and its pictures."""
    styles = {f"portrait, {s}": lambda s=s: pictures.portraits(n // 2, s) for s in STYLES[1:]}
    photos = {f"head of {h} px in a photo of 1024": lambda h=h: pictures.photo(n // 4, h) for h in (24, 48, 128, 700)}
    return {
        "portrait, photo style": lambda: pictures.portraits(n),
        **styles,
        "portrait of 32 px, enlarged": lambda: pictures.blurred(n // 2),
        "portrait, dark and grainy": lambda: pictures.noisy(n // 2),
        "portrait, a third covered": lambda: pictures.covered(n // 2),
        "four people in clutter of 512 px": lambda: pictures.several(n // 4),
        **photos,
        "nobody": lambda: pictures.nobody(2 * n),
    }


def measure(detector: Path, faces: FaceSet, n: int) -> dict[str, dict[int, Score]]:
    """Scores by circumstance and size."""
    model = get_model(str(detector), providers=["CPUExecutionProvider"])
    model.prepare(-1, input_size=(SIZES[0], SIZES[0]), det_thresh=0.5)
    table: dict[str, dict[int, Score]] = {}
    for name, make in circumstances(Pictures(faces), n).items():
        table[name] = {size: Score() for size in SIZES}
        for picture in make():
            pixels = (picture.image.flip(0).permute(1, 2, 0) * 255).round().byte().numpy()  # insightface: BGR
            for size, score in table[name].items():
                _, points = model.detect(np.ascontiguousarray(pixels), input_size=(size, size))
                _count(score, picture, np.zeros((0, 5, 2)) if points is None else points)
    return table


def _count(score: Score, picture: Picture, found: np.ndarray) -> None:
    """Match each head with the nearest face found whose centre lies within a fifth of its render's side."""
    left = list(found)
    score.pictures += 1
    for true, scale in zip(picture.keypoints.numpy(), picture.scales.tolist()):
        score.heads += 1
        away = [float(np.linalg.norm(f.mean(0) - true.mean(0))) for f in left]
        if away and min(away) < SIDE * scale / 5:
            points = left.pop(int(np.argmin(away)))
            score.found += 1
            score.errors.append(float(np.linalg.norm(points - true, axis=1).mean()) / scale)
    score.false += len(left)


def report(tables: dict[str, dict[str, dict[int, Score]]]) -> str:
    """The tables in Markdown."""
    lines = ["# mini's face detector", "", *(line for line in (__doc__ or "").splitlines()[5:] if line), ""]
    for title, table in tables.items():
        sizes = [f"{s}: {what}" for s in SIZES for what in ("found", "false", "px")]
        lines += [f"## {title}", "", f"| | heads | {' | '.join(sizes)} |", "|" + "---|" * (2 + len(sizes))]
        for name, row in table.items():
            some = row[SIZES[0]]
            heads = some.heads or f"none in {some.pictures} pictures"
            lines.append(f"| {name} | {heads} | {' | '.join(str(s) for s in row.values())} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--detector", type=Path, default=SHIPPED)
    parser.add_argument("--against", type=Path, help="another detector, measured on the same pictures")
    parser.add_argument("--shards", type=Path, default=SHARDS, help="rendered data (`python -m idgen.training data`)")
    parser.add_argument("--pictures", type=int, default=160, help="portraits in the photo style; others are fewer")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "mini_faces.md")
    o = parser.parse_args()
    torch.set_num_threads(1)
    faces = FaceSet.read(o.shards, "validation")
    tables = {"This one": measure(o.detector, faces, o.pictures)}
    if o.against:
        tables["The one before"] = measure(o.against, faces, o.pictures)
    o.out.write_text(report(tables))
    print(o.out.read_text())


if __name__ == "__main__":
    main()
