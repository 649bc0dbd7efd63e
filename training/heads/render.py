"""Batched sphere tracing of the heads, shading, and the exact landmarks, boxes and face masks that go with a
picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import styles
from .geometry import PIVOT, distance, mouth_shape, pack_shape
from .material import Surface, pack_palette, surface
from .nuisances import STYLES, Nuisances, caption
from .people import describe

CAMERA_Z = 6.5
"""Distance of the camera from the origin (head units)."""
HALF_HEIGHT = 1.42
"""Half of the visible height at the origin's depth (head units)."""
RAISE = 0.17
"""How far the head is lifted in the frame (head units)."""
COARSE_STEPS, FULL_STEPS, LAST_STEPS = 20, 8, 18


@dataclass
class Renders:
    """A batch of pictures and what is exactly known about them.

    ``images`` [n, 3, S, S] in 0..1; ``keypoints`` [n, 5, 2] in pixels (left eye, right eye, nose, left and right mouth
    corner, left meaning left in the image); ``boxes`` [n, 4] in pixels (x0, y0, x1, y1); ``masks`` [n, 1, S, S] in
    0..1, the visible skin and eyes of the face; ``captions``; ``attributes``: name -> class indices [n].
    """

    images: Tensor
    keypoints: Tensor
    boxes: Tensor
    masks: Tensor
    captions: list[str]
    attributes: dict[str, Tensor]


def rotation_matrix(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Rz(roll) Ry(yaw) Rx(pitch), radians: [n] each -> [n, 3, 3]."""
    o, i = torch.zeros_like(yaw), torch.ones_like(yaw)
    cy, sy, cp, sp, cr, sr = yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin(), roll.cos(), roll.sin()
    ry = torch.stack([cy, o, sy, o, i, o, -sy, o, cy], 1).view(-1, 3, 3)
    rx = torch.stack([i, o, o, o, cp, -sp, o, sp, cp], 1).view(-1, 3, 3)
    rz = torch.stack([cr, -sr, o, sr, cr, o, o, o, i], 1).view(-1, 3, 3)
    return rz @ ry @ rx


@cache
def _functions(compiled: bool) -> tuple[Any, Any]:
    """The distance and surface functions, compiled or not. Compiling more than these two takes minutes and gains
    nothing.
    """
    if compiled:
        return torch.compile(distance, dynamic=False), torch.compile(surface, dynamic=False)
    return distance, surface


def _rays(size: int, values: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Unit ray directions through the pixel centres, three tensors [n, size * size]."""
    at = (torch.arange(size, device=values["scale"].device) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(-at, at, indexing="ij")
    sx = x.reshape(1, -1) * HALF_HEIGHT / values["scale"] - values["shift_x"]
    sy = y.reshape(1, -1) * HALF_HEIGHT / values["scale"] - RAISE - values["shift_y"]
    inverse = torch.rsqrt(sx * sx + sy * sy + CAMERA_Z**2)
    return (sx * inverse).contiguous(), (sy * inverse).contiguous(), (-CAMERA_Z * inverse).contiguous()


def _trace(size: int, v: dict[str, Tensor], rotation: Tensor, shape: Tensor, dist: Any) -> tuple[Tensor, Tensor]:
    """Depth along each ray and coverage (antialiased silhouette), both [n, size * size].

    Half resolution first; its conservative depth starts the full-resolution rays, and the few grazing rays that have
    not arrived by then get extra steps in a fixed-size group (fixed shapes keep compiled code valid).
    """
    n, half = shape.shape[0], size // 2
    dx, dy, dz = _rays(half, v)
    t = ((CAMERA_Z - 1.7) / -dz).contiguous()
    far = (CAMERA_Z + 1.7) / -dz
    for _ in range(COARSE_STEPS):
        t = torch.minimum(t + dist(dx * t, dy * t, CAMERA_Z + dz * t, rotation, shape) * 0.95, far)
    t = -F.max_pool2d(-t.view(n, 1, half, half), 3, 1, 1)
    t = (F.interpolate(t, scale_factor=2, mode="nearest").view(n, -1) - 0.04).contiguous()

    dx, dy, dz = _rays(size, v)
    far = (CAMERA_Z + 1.7) / -dz
    nearest = torch.full_like(t, 9.0)
    d = nearest
    for _ in range(FULL_STEPS):
        d = dist(dx * t, dy * t, CAMERA_Z + dz * t, rotation, shape)
        nearest = torch.minimum(nearest, d)
        t = torch.minimum(t + d * 0.95, far)
    worst = torch.where(t >= far - 1e-3, torch.full_like(d, -1.0), d).topk(size * size // 8, dim=1).indices
    ts, fs, ns, ex, ey, ez = (a.expand(n, -1).gather(1, worst).contiguous() for a in (t, far, nearest, dx, dy, dz))
    for _ in range(LAST_STEPS):
        d = dist(ex * ts, ey * ts, CAMERA_Z + ez * ts, rotation, shape)
        ns = torch.minimum(ns, d)
        ts = torch.minimum(ts + d * 0.97, fs)
    t, nearest = t.scatter(1, worst, ts), nearest.scatter(1, worst, ns)

    pixel = 2 * HALF_HEIGHT / size
    missed = t >= far - 1e-3
    alpha = torch.where(missed, (1.2 - nearest / pixel * 1.2).clamp(0, 1), torch.ones_like(t))
    return t, torch.where(nearest > 0.02, torch.zeros_like(alpha), alpha)


def _normals(x: Tensor, y: Tensor, z: Tensor, args: tuple[Tensor, Tensor], dist: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Surface normals by the tetrahedron rule."""
    e = 0.006
    d1, d2 = dist(x + e, y - e, z - e, *args), dist(x - e, y - e, z + e, *args)
    d3, d4 = dist(x - e, y + e, z - e, *args), dist(x + e, y + e, z + e, *args)
    nx, ny, nz = d1 - d2 - d3 + d4, -d1 - d2 + d3 + d4, -d1 + d2 - d3 + d4
    inverse = torch.rsqrt(nx * nx + ny * ny + nz * nz + 1e-12)
    return nx * inverse, ny * inverse, nz * inverse


def _shade(
    t: Tensor,
    alpha: Tensor,
    size: int,
    v: dict[str, Tensor],
    statue: Tensor,
    args: tuple[Tensor, Tensor],
    palette: Tensor,
    functions: tuple[Any, Any],
) -> tuple[Tensor, Tensor, Surface]:
    """Lit image [n, 3, S, S], geometry channels for the drawn styles [n, 6, S, S], and the surface."""
    dist, paint = functions
    dx, dy, dz = _rays(size, v)
    x, y, z = (dx * t).contiguous(), (dy * t).contiguous(), (CAMERA_Z + dz * t).contiguous()
    nx, ny, nz = _normals(x, y, z, args, dist)
    occlusion = torch.zeros_like(x)
    for h, weight in ((0.06, 1.6), (0.16, 1.2), (0.34, 0.7)):
        occlusion = occlusion + (h - dist(x + nx * h, y + ny * h, z + nz * h, *args)).clamp(min=0) * weight
    ao = (1 - occlusion).clamp(0.12, 1)
    lx, ly, lz = (v[k].expand_as(t).contiguous() for k in ("light_x", "light_y", "light_z"))
    lit = torch.ones_like(x)
    for s in (0.05, 0.11, 0.20, 0.33, 0.52, 0.8):
        d = dist(x + nx * 0.03 + lx * s, y + ny * 0.03 + ly * s, z + nz * 0.03 + lz * s, *args)
        lit = torch.minimum(lit, (d / s * 5 + 0.35).clamp(0, 1))
    m: Surface = paint(x, y, z, *args, palette)

    ndl = nx * lx + ny * ly + nz * lz
    wrap = ((ndl + 0.25) / 1.25).clamp(0, 1) * (0.35 + 0.65 * lit)
    hx, hy, hz = lx - dx, ly - dy, lz - dz
    ndh = ((nx * hx + ny * hy + nz * hz) * torch.rsqrt(hx * hx + hy * hy + hz * hz + 1e-9)).clamp(0, 1)
    gloss = ndh**24 * (0.12 + 0.22 * m.lips + 0.10 * m.hair - 0.10 * m.cloth) * lit
    gloss = gloss + ndh**90 * (0.9 * m.eye + 0.7 * m.glasses)
    fresnel = (1 + (nx * dx + ny * dy + nz * dz)).clamp(0, 1) ** 3
    sky = 0.6 + 0.4 * ny
    skin = (1 - statue) * (1 - m.cloth) * (1 - m.hair)
    at = (torch.arange(size, device=t.device) + 0.5) / size * 2 - 1
    py, px = torch.meshgrid(-at, at, indexing="ij")
    vignette = ((1.10 - 0.22 * (px**2 + (py - 0.1) ** 2)) * (0.86 + 0.14 * py)).reshape(1, -1)
    channels = []
    for k, (c, albedo) in enumerate(zip("rgb", (m.red, m.green, m.blue))):
        light, back = v[f"light_{c}"], v[f"background_{c}"]
        base = albedo + ((0.86, 0.84, 0.80)[k] * m.carve - albedo) * statue
        # Light that enters the skin near the terminator comes out red.
        scatter = torch.exp(-(((ndl - 0.05) / 0.22) ** 2)) * (0.10, 0.02, 0.0)[k] * skin
        diffuse = wrap * 0.95 * light + scatter + v["ambient"] * sky * ao * (0.75 + 0.25 * light)
        colour = base * (diffuse + 0.16 * fresnel * (0.4 + 0.6 * back)) + gloss * light
        ground = back * vignette
        channels.append(ground + (colour.clamp(0, 1.4) - ground) * alpha)
    image = torch.stack(channels, 1).clamp(min=0)
    image = (image / (1 + 0.12 * image) * 1.10).clamp(0, 1) ** (1 / 1.45)
    aux = [nx * alpha, ny * alpha, nz * alpha, alpha * 1.5 + (t - CAMERA_Z) * alpha, m.hair * alpha, m.eye + m.lips]
    n = len(t)
    return image.view(n, 3, size, size), torch.stack(aux, 1).view(n, 6, size, size), m


def _soften(images: Tensor) -> Tensor:
    """A 3x3 binomial-like blur: what stands in for antialiasing inside the figure, far cheaper than supersampling."""
    kernel = images.new_tensor([0.12, 0.76, 0.12])
    weight = (kernel[:, None] * kernel[None, :]).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), weight, groups=3)


def _project(points: Tensor, values: dict[str, Tensor], rotation: Tensor, size: int) -> Tensor:
    """Head-space points [n, k, 3] to pixel coordinates [n, k, 2]."""
    pivot = points.new_tensor(PIVOT)
    world = torch.einsum("bij,bnj->bni", rotation, points - pivot) + pivot
    near = CAMERA_Z / (CAMERA_Z - world[..., 2])
    scale = values["scale"][:, None] / HALF_HEIGHT
    x = (world[..., 0] * near + values["shift_x"][:, None]) * scale
    y = (world[..., 1] * near + RAISE + values["shift_y"][:, None]) * scale
    return torch.stack([(x + 1) / 2 * size, (1 - y) / 2 * size], -1)


def landmarks(person: dict[str, Tensor], values: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Five keypoints [n, 5, 2] and face boxes [n, 4], in pixels."""
    rotation = rotation_matrix(values["yaw"], values["pitch"], values["roll"])
    g = {**person, "smile": values["smile"], "open": values["open"]}
    mouth, mouth_y = mouth_shape(g)
    o = torch.zeros_like(mouth)
    eye_z = 0.57 + g["eye_size"]
    nose_y = g["eye_height"] + 0.06 - g["nose_length"]
    points = [
        (-g["eye_gap"], g["eye_height"], eye_z),
        (g["eye_gap"], g["eye_height"], eye_z),
        (o, nose_y, 0.66 + g["nose_depth"] + g["nose_tip"]),
        (-mouth, mouth_y, 0.60 + o),
        (mouth, mouth_y, 0.60 + o),
    ]
    keypoints = _project(torch.stack([torch.stack(p, 1) for p in points], 1), values, rotation, size)
    half = g["face_width"] + 0.06
    rim = [(s * half, y + o, z + o) for s in (-1, 1) for y, z in ((0.62, 0.3), (-0.05, 0.45), (-0.92, 0.35))]
    outline = _project(torch.stack([torch.stack(p, 1) for p in rim], 1), values, rotation, size)
    return keypoints, torch.cat([outline.amin(1), outline.amax(1)], 1)


@torch.no_grad()
def render(people: Tensor, nuisances: Nuisances, size: int = 128, *, compiled: bool = False) -> Renders:
    """Draw ``people`` [n, D] under ``nuisances`` (same length) at ``size`` x ``size`` pixels (even), on people's
    device.

    ``compiled`` runs torch.compile over the distance field: a minute once per batch shape, then several times faster.
    Raises ValueError when the lengths differ.
    """
    if len(people) != len(nuisances):
        raise ValueError(f"{len(people)} people but {len(nuisances)} circumstances")
    device = people.device
    nuisances = nuisances.to(device)
    person, values, labels = describe(people), nuisances.values, nuisances.labels
    n = len(people)
    shape, palette = pack_shape(person, values), pack_palette(person, values)
    rotation = rotation_matrix(values["yaw"], values["pitch"], values["roll"]).reshape(n, 9)[:, :, None].contiguous()
    columns = {k: x[:, None] for k, x in values.items()}
    functions = _functions(compiled)
    t, alpha = _trace(size, columns, rotation, shape, functions[0])
    style = labels["style"]
    statue = (style == STYLES.index("statue")).float()[:, None]
    images, geometry, m = _shade(t, alpha, size, columns, statue, (rotation, shape), palette, functions)
    mask = (m.face * alpha).view(n, 1, size, size).clamp(0, 1)

    coverage = alpha.view(n, 1, size, size)
    out = _soften(images)
    for name, draw in (
        ("sketch", lambda i: styles.sketch(images[i], geometry[i], coverage[i])),
        ("comic", lambda i: styles.comic(images[i], geometry[i])),
        ("painting", lambda i: styles.painting(images[i])),
    ):
        rows = (style == STYLES.index(name)).nonzero().flatten()
        if len(rows):
            out[rows] = _soften(draw(rows))
    keypoints, boxes = landmarks(person, values, size)
    plain = {k: v.cpu() for k, v in labels.items()}  # one transfer instead of one per word
    captions = [caption(plain, i) for i in range(n)]
    return Renders(out.clamp(0, 1), keypoints, boxes, mask, captions, dict(labels))
