"""Scenes for the detector: heads pasted at any size, turn and place into cluttered pictures, and pictures of nobody.

A render always shows one head of much the same size, in the middle. A photo does not, so the detector trains on
scenes: canvases with none to four heads between ten pixels and the whole canvas, mirrored or not, on synthetic clutter
(dead leaves, stripes, noise, gradients, pieces of clothes and hair), partly covered, blurred, noisy, too dark, grey,
and with the black bands that insightface adds to make a picture square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .facedata import FaceSet

MOST = 4
"""Heads a scene has at most."""
PORTRAITS = 0.35
"""Share of the scenes of one head in which its render simply fills the picture: what idgen looks at most."""
_MIRRORED = (1, 0, 2, 4, 3)
"""Which keypoint takes each one's place in a mirrored picture."""


@dataclass
class Scene:
    """images: float [n, 3, S, S] in 0..1; keypoints [n, MOST, 5, 2] and boxes [n, MOST, 4] in pixels;
    present: bool [n, MOST], whether that head is there to be found."""

    images: Tensor
    keypoints: Tensor
    boxes: Tensor
    present: Tensor

    def to(self, device: torch.device | str) -> Scene:
        """The same scenes on another device."""
        return Scene(*(t.to(device) for t in (self.images, self.keypoints, self.boxes, self.present)))

    def enlarged(self, factor: int) -> Scene:
        """The same scenes drawn out to ``factor`` times the size, as insightface does with a small photo."""
        images = F.interpolate(self.images, scale_factor=float(factor), mode="bilinear")
        return Scene(images, self.keypoints * factor, self.boxes * factor, self.present)


def _uniform(low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape)


def dead_leaves(n: int, size: int = 256, leaves: int = 60) -> Tensor:
    """Overlapping discs, boxes and bars of all sizes [n, 3, size, size]: the edge statistics of photographs.

    (Lee, Mumford and Huang, 2001: sizes distributed as 1 / r^3.)
    """
    steps = torch.linspace(0, 1, size)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    out = torch.rand(n, 3, 1, 1).expand(n, 3, size, size).clone()
    for _ in range(leaves):
        cx, cy = torch.rand(2, n, 1, 1)
        radius = 0.45 * _uniform(1, 100, n, 1, 1) ** -0.5
        aspect, angle = _uniform(0.3, 1, n, 1, 1), _uniform(0, 3.15, n, 1, 1)
        u = (x - cx) * angle.cos() + (y - cy) * angle.sin()
        v = ((y - cy) * angle.cos() - (x - cx) * angle.sin()) / aspect
        disc, box = (u * u + v * v).sqrt(), torch.maximum(u.abs(), v.abs())
        inside = (torch.where(torch.rand(n, 1, 1) < 0.6, disc, box) < radius)[:, None]
        shade = 1 + _uniform(-0.6, 0.6, n, 1, 1, 1) * (u / radius)[:, None].clamp(-1, 1)
        out = torch.where(inside, torch.rand(n, 3, 1, 1) * shade, out)
    return out.clamp(0, 1)


def textures(n: int, size: int = 256) -> Tensor:
    """Noise of all grains, stripes and gradients [n, 3, size, size] in 0..1."""
    steps = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    out = []
    for i in range(n):
        a, b = torch.rand(2, 3, 1, 1)
        kind = i % 4
        if kind == 0:  # coloured noise, summed over grains
            total, weight = torch.zeros(3, size, size), 0.0
            for grain in (4, 8, 16, 32, 64, 128, size):
                amount = float(torch.rand(())) ** 2
                noise = torch.randn(1, 3 if torch.rand(()) < 0.7 else 1, grain, grain)
                total = total + amount * F.interpolate(noise, size=size, mode="bicubic")[0]
                weight += amount * amount
            total = total / max(weight, 1e-3) ** 0.5 * _uniform(0.08, 0.35, 1)
            out.append(a + total if torch.rand(()) < 0.6 else 0.5 + total)
        elif kind == 1:  # stripes and checks
            angle, beat = _uniform(0, 3.15, 1), _uniform(3, 60, 1)
            wave = torch.sin(beat * (x * angle.cos() + y * angle.sin()))
            if torch.rand(()) < 0.5:
                wave = wave * torch.sin(beat * (y * angle.cos() - x * angle.sin()))
            if torch.rand(()) < 0.5:
                wave = wave.sign()
            out.append(a + (b - a) * (wave * 0.5 + 0.5))
        elif kind == 2:  # gradient
            angle = _uniform(0, 6.3, 1)
            out.append(a + (b - a) * (0.5 + 0.4 * (x * angle.cos() + y * angle.sin())))
        else:  # plain, slightly vignetted
            out.append(a * (1 - _uniform(0, 0.3, 1) * (x * x + y * y)))
    return torch.stack([o.expand(3, size, size) for o in out]).clamp(0, 1)


class Clutter:
    """A bank of pictures of nobody, uint8 [n, 3, size, size], cut and turned anew at each use."""

    def __init__(self, faces: FaceSet, n: int = 512, size: int = 256) -> None:
        third = n // 4
        leaves = torch.cat([dead_leaves(16, size) for _ in range(-(-third * 2 // 16))])
        parts = []
        for i in torch.randint(0, len(faces), (third,)).tolist():
            # Hair, hats and shoulders without the face: the most tempting wrong answers.
            image, box = faces.images[i].float() / 255, faces.boxes[i]
            high, top, bottom = image.shape[1], int(box[1]), int(box[3])
            above = top > high - bottom
            strip = image[:, : max(8, int(0.9 * top))] if above else image[:, min(high - 8, bottom + 4) :]
            parts.append(F.interpolate(strip[None], size=(size, size), mode="bilinear")[0])
        # Heads cut into a shuffled mosaic: eyes and mouths, but no face.
        for i in torch.randint(0, len(faces), (n // 16,)).tolist():
            tiles = F.interpolate(faces.images[i][None].float() / 255, size=(size, size), mode="bilinear")[0]
            tiles = tiles.unfold(1, size // 4, size // 4).unfold(2, size // 4, size // 4).reshape(3, 16, size // 4, -1)
            mixed = tiles[:, torch.randperm(16)].view(3, 4, 4, size // 4, size // 4)
            parts.append(mixed.permute(0, 1, 3, 2, 4).reshape(3, size, size))
        everything = torch.cat([leaves, textures(third, size), torch.stack(parts)])
        self.bank = (everything.clamp(0, 1) * 255).byte()

    def draw(self, n: int, size: int) -> Tensor:
        """Random pieces [n, 3, size, size] in 0..1."""
        pick = self.bank[torch.randint(0, len(self.bank), (n,))].float() / 255
        zoom, angle = _uniform(0.25, 1.0, n), _uniform(0, 6.3, n)
        matrix = torch.zeros(n, 2, 3)
        matrix[:, 0, 0] = matrix[:, 1, 1] = zoom * angle.cos()
        matrix[:, 0, 1], matrix[:, 1, 0] = -zoom * angle.sin(), zoom * angle.sin()
        matrix[:, :, 2] = _uniform(-0.4, 0.4, n, 2)
        grid = F.affine_grid(matrix, [n, 3, size, size], align_corners=False)
        return F.grid_sample(pick, grid, padding_mode="reflection", align_corners=False)


def _cells(count: int, wide: float, high: float) -> list[tuple[float, float, float, float]]:
    """Places for so many heads: x0, y0, x1, y1 of each cell in pixels."""
    if count == 1:
        return [(0, 0, wide, high)]
    split, other = (float(_uniform(0.35, 0.65, 1)) for _ in range(2))
    if count == 2 and torch.rand(()) < 0.6:
        return [(0, 0, wide * split, high), (wide * split, 0, wide, high)]
    x, y = wide * split, high * other
    quarters = [(0, 0, x, y), (x, 0, wide, y), (0, y, x, high), (x, y, wide, high)]
    return [quarters[i] for i in torch.randperm(4)[:count].tolist()]


def compose(faces: FaceSet, clutter: Clutter, n: int, size: int) -> Scene:
    """``n`` random scenes of ``size`` pixels, a multiple of 32."""
    scene = Scene(
        clutter.draw(n, size),
        torch.zeros(n, MOST, 5, 2),
        torch.zeros(n, MOST, 4),
        torch.zeros(n, MOST, dtype=torch.bool),
    )
    counts = torch.multinomial(torch.tensor([0.14, 0.52, 0.18, 0.08, 0.08]), n, True).tolist()
    # The part of the canvas that the picture fills; insightface leaves the rest, right and below, black.
    filled = [(1.0, 1.0) if torch.rand(()) < 0.7 else tuple(_uniform(0.5, 1, 2).tolist()) for _ in range(n)]
    places = [_cells(c, w * size, h * size) if c else [] for c, (w, h) in zip(counts, filled)]
    for slot in range(MOST):
        rows = [i for i in range(n) if len(places[i]) > slot]
        if rows:
            alone = torch.tensor([counts[i] == 1 for i in rows])
            portrait = alone & (torch.rand(len(rows)) < PORTRAITS)
            _paste(scene, slot, torch.tensor(rows), torch.tensor([places[i][slot] for i in rows]), portrait, faces)
    _cover(scene, clutter)
    scene.images = _degrade(scene.images)
    for i, (w, h) in enumerate(filled):
        scene.images[i, :, :, round(w * size) :] = 0
        scene.images[i, :, round(h * size) :] = 0
    return scene


def _paste(scene: Scene, slot: int, rows: Tensor, cell: Tensor, portrait: Tensor, faces: FaceSet) -> None:
    """Paste a random head into the ``cell`` [m, 4] of each of the scene's ``rows`` [m] and note where it went.

    portrait: bool [m], whether the render fills its cell, upright, instead of lying anywhere at any size.
    """
    m, size, side = len(rows), scene.images.shape[-1], faces.images.shape[-1]
    pick = torch.randint(0, len(faces), (m,))
    box, points = faces.boxes[pick], faces.keypoints[pick]
    half, centre, middle = (box[:, 2:] - box[:, :2]) / 2, (box[:, :2] + box[:, 2:]) / 2, points.mean(1)
    extent = cell[:, 2:] - cell[:, :2]
    room = extent.min(1).values
    # Sizes log-uniform from 10 pixels (more on large canvases, small heads are learnt on small ones) to a close-up that
    # the cell's border cuts.
    least = max(10.0, size / 12)
    head = least * (torch.rand(m) * (1.15 * room / least).clamp(min=1.2).log()).exp()
    zoom = torch.where(portrait, room / side * _uniform(0.95, 1.2, m), head / half.max(1).values / 2)
    angle = torch.where(torch.rand(m) < 0.7, _uniform(-0.25, 0.25, m), _uniform(-0.8, 0.8, m))
    angle = torch.where(portrait, 0.2 * angle, angle)
    mirror = torch.where(torch.rand(m) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    turn = torch.stack([cos * mirror, -sin, sin * mirror, cos], 1).view(-1, 2, 2)
    slack = (extent / 2 - 0.42 * head[:, None]).clamp(min=2)
    anywhere = _uniform(-1, 1, m, 2) * slack
    centred = _turned(middle - side / 2, turn) + _uniform(-0.05, 0.05, m, 2) * room[:, None]
    where = (cell[:, :2] + cell[:, 2:]) / 2 + torch.where(portrait[:, None], centred, anywhere)

    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    pixels = torch.stack([x.flatten(), y.flatten()])[None] - where[:, :, None]
    source = torch.linalg.inv(turn) @ pixels + middle[:, :, None]  # [m, 2, size * size], pixels of the render
    grid = (source / side * 2 - 1).transpose(1, 2).reshape(m, size, size, 2)
    patch = F.grid_sample(faces.images[pick].float() / 255, grid, padding_mode="border", align_corners=False)

    # The whole render as a tilted print, an oval cut-out of the head, or the render's rim drawn out over the cell.
    square = ((source > 0) & (source < side)).all(1).float()
    away = ((source - centre[:, :, None]) / half[:, :, None] / 1.52).pow(2).sum(1)
    oval = ((1.15 - away) * 4).clamp(0, 1) * square
    kind = torch.where(portrait, 1.0, torch.rand(m))[:, None]
    alpha = torch.where(kind < 0.4, square, torch.where(kind < 0.75, oval, torch.ones_like(oval)))
    across = (x >= cell[:, 0, None, None]) & (x < cell[:, 2, None, None])
    within = across & (y >= cell[:, 1, None, None]) & (y < cell[:, 3, None, None])
    alpha = alpha.view(m, 1, size, size) * within[:, None]
    scene.images[rows] = torch.lerp(scene.images[rows], patch, alpha)

    # The box of a turned head: turn its centre, keep its size. Turned corners would make it too large.
    moved = where + _turned(centre - middle, turn)
    reach = half * zoom[:, None]
    placed = (points - middle[:, None]) @ turn.transpose(1, 2) + where[:, None]
    scene.keypoints[rows, slot] = torch.where((mirror < 0)[:, None, None], placed[:, _MIRRORED], placed)
    scene.boxes[rows, slot] = torch.cat([moved - reach, moved + reach], 1)
    scene.present[rows, slot] = True


def _turned(points: Tensor, turn: Tensor) -> Tensor:
    """Points [m, 2] times matrices [m, 2, 2]."""
    return (turn @ points[:, :, None])[:, :, 0]


def _cover(scene: Scene, clutter: Clutter, share: float = 0.2) -> None:
    """Lay a piece of clutter over a part of some heads: at most two fifths of the box, never its centre."""
    size = scene.images.shape[-1]
    chosen = (scene.present & (torch.rand(scene.present.shape) < share)).nonzero().tolist()
    for (i, slot), piece in zip(chosen, clutter.draw(max(1, len(chosen)), size)):
        x0, y0, x1, y1 = scene.boxes[i, slot].tolist()
        part, edge = float(_uniform(0.1, 0.4, 1)), int(torch.randint(0, 4, ()))
        if edge == 0:
            x1 = x0 + part * (x1 - x0)
        elif edge == 1:
            x0 = x1 - part * (x1 - x0)
        elif edge == 2:
            y1 = y0 + part * (y1 - y0)
        else:
            y0 = y1 - part * (y1 - y0)
        a, b, c, d = (min(size, max(0, round(v))) for v in (y0, y1, x0, x1))
        scene.images[i, :, a:b, c:d] = piece[:, a:b, c:d]


def _degrade(images: Tensor) -> Tensor:
    """Blur, exposure, contrast, tint, grey and noise, each for some of the images [n, 3, S, S] in 0..1."""
    n = len(images)
    pick = torch.rand(n)[:, None, None, None]
    for factor, low, high in ((2, 0.0, 0.2), (4, 0.2, 0.25)):
        soft = F.interpolate(F.avg_pool2d(images, factor), scale_factor=float(factor), mode="bilinear")
        images = torch.where((pick >= low) & (pick < high), soft, images)
    grey = images.mean(1, keepdim=True)
    images = torch.where(torch.rand(n, 1, 1, 1) < 0.1, grey.expand_as(images), images)
    plain = torch.rand(n, 1, 1, 1) < 0.3
    gain, tint = _uniform(0.5, 1.35, n, 1, 1, 1), 1 + 0.12 * torch.randn(n, 3, 1, 1)
    changed = images.clamp(1e-3, 1) ** _uniform(0.7, 1.4, n, 1, 1, 1) * gain * tint
    images = torch.where(plain, images, changed)
    noisy = (torch.rand(n, 1, 1, 1) < 0.5) * _uniform(0, 0.09, n, 1, 1, 1)
    return (images + noisy * torch.randn_like(images)).clamp(0, 1)
