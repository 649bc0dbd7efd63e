"""The head as a signed distance field (SDF), batched: every function maps coordinates [B, R] to distances [B, R].

Axes of head space: x to the viewer's right, y up, z towards the camera, origin between the eyes' height and the skull's
centre. "Body space" is the same without the head's rotation (neck and shoulders do not turn with the head). Symmetry
comes from evaluating at sqrt(x^2 + small). Primitives and joins: Inigo Quilez, "Distance functions" and "Smooth
minimum".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PIVOT = (0.0, -0.55, -0.16)
"""The point of the neck about which the head turns (head units)."""

SHAPE: tuple[str, ...] = (
    "skull_width", "skull_height", "face_width", "face_height", "jaw", "chin_width", "chin_drop", "chin_depth", "cheek",
    "nose_length", "nose_depth", "nose_width", "nose_tip", "nose_bridge", "eye_gap", "eye_size", "eye_height",
    "eye_slant",
    "lid_upper", "lid_lower", "socket", "brow_height", "brow_thickness", "brow_arch", "brow_tilt", "brow_gap",
    "mouth_height", "mouth_width", "upper_lip", "lower_lip", "ear", "neck", "hair_side", "hair_top", "hair_length",
    "fringe", "parting", "curl", "no_hair", "bun", "beard", "moustache", "wrinkles",
    "smile", "open", "brow_raise", "brow_angle", "glasses", "hat",
)  # fmt: skip
"""Columns of the shape tensor [B, len(SHAPE), 1] that all functions here take."""


def pack_shape(person: dict[str, Tensor], values: dict[str, Tensor]) -> Tensor:
    """Parameters of the person and of the moment -> [B, len(SHAPE), 1]."""
    p = {**person, **{k: values[k] for k in ("smile", "open", "brow_raise", "brow_angle", "glasses", "hat")}}
    close = values["close_eyes"]
    lid_open = 0.30 + 0.50 * person["lid"]
    # Lid angles (radians above and below the eye's equator); negative `close_eyes` widens the eye.
    p["lid_upper"] = torch.where(close >= 0, lid_open * (1 - close) - 0.42 * close, lid_open - close)
    awake = 1 - close.clamp(min=0)
    p["lid_lower"] = -0.42 - 0.18 * awake - (-close).clamp(min=0) * 0.3 + values["smile"].clamp(0, 1) * 0.16 * awake
    return torch.stack([p[k] for k in SHAPE], 1)[:, :, None].contiguous()


def smooth_min(a: Tensor, b: Tensor, k: Tensor | float) -> Tensor:
    """Polynomial smooth minimum, ``k`` the width of the join."""
    h = (k - (a - b).abs()).clamp(min=0) / k
    return torch.minimum(a, b) - h * h * k * 0.25


def smooth_max(a: Tensor, b: Tensor, k: Tensor | float) -> Tensor:
    """Polynomial smooth maximum."""
    return -smooth_min(-a, -b, k)


def ellipsoid(x: Tensor, y: Tensor, z: Tensor, a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor:
    """First-order distance to an ellipsoid with semi-axes a, b, c: k0 (k0 - 1) / k1."""
    x, y, z = x / a, y / b, z / c
    k0 = torch.sqrt(x * x + y * y + z * z + 1e-9)
    x, y, z = x / a, y / b, z / c
    k1 = torch.sqrt(x * x + y * y + z * z + 1e-9)
    return k0 * (k0 - 1) / k1


def sphere(x: Tensor, y: Tensor, z: Tensor, r: Tensor | float) -> Tensor:
    """Distance to a sphere of radius ``r`` at the origin."""
    return torch.sqrt(x * x + y * y + z * z + 1e-9) - r


def ramp(low: Tensor | float, high: Tensor | float, x: Tensor) -> Tensor:
    """Smoothstep from 0 at ``low`` to 1 at ``high`` (``low`` > ``high`` gives a falling one)."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def bump(x: Tensor, width: Tensor | float) -> Tensor:
    """exp(-(x / width)^2)."""
    return torch.exp(-((x / width) ** 2))


class Paint(NamedTuple):
    """Fields painted on the front of the face, each [B, R] in 0..1: 2-D in head space, gated by z."""

    lips: Tensor
    inner: Tensor
    line: Tensor
    teeth: Tensor
    lip_bump: Tensor
    brow: Tensor
    brow_bump: Tensor
    beard: Tensor
    moustache: Tensor
    wrinkle: Tensor
    front: Tensor


class Parts(NamedTuple):
    """Distances to the parts of the figure [B, R], the upper lid's cutting plane and the painted fields."""

    skin: Tensor
    eye: Tensor
    hair: Tensor
    torso: Tensor
    glasses: Tensor
    hat: Tensor
    neck: Tensor
    upper_lid: Tensor
    paint: Paint


def mouth_shape(g: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Half width of the mouth and the height that its corners have at rest plus expression, both [B, 1]."""
    width = g["mouth_width"] * (1 + 0.22 * g["smile"].clamp(min=0) - 0.25 * g["open"] * (1 - g["smile"].clamp(0, 1)))
    return width, g["mouth_height"] + g["smile"] * 0.085 * 0.55 - g["open"] * 0.03


def paint_fields(x: Tensor, y: Tensor, z: Tensor, g: dict[str, Tensor]) -> Paint:
    """Lips, mouth, brows, beard and wrinkles as functions of the head coordinates."""
    ax = torch.sqrt(x * x + 1e-4)
    front = ramp(0.15, 0.35, z)
    edge = 0.014

    mouth_width, _ = mouth_shape(g)
    u = ax / mouth_width
    u2 = (u * u).clamp(max=1.6)
    arch = torch.sqrt((1 - u2).clamp(min=0) + 1e-6)
    centre = g["mouth_height"] + g["smile"] * 0.085 * (u2 - 0.45) - g["open"] * 0.03
    gape = g["open"] * 0.13 * arch
    upper = g["upper_lip"] * arch * (1 - 0.35 * bump(x, 0.035))
    lower = g["lower_lip"] * arch
    dy = y - centre
    lips = (
        ramp(-edge, edge, gape + upper - dy) * ramp(-edge, edge, dy + gape * 1.25 + lower) * ramp(1.0, 0.93, u) * front
    )
    is_open = (g["open"] > 0.1).to(x.dtype)
    inner = ramp(-edge, edge, gape - dy) * ramp(-edge, edge, dy + gape * 1.25) * ramp(0.96, 0.86, u) * front * is_open
    line = bump(dy, 0.013) * ramp(1.08, 0.9, u) * front * (1 - is_open)
    teeth = inner * ramp(-edge, edge, dy - gape * 0.42)
    lip_bump = bump(dy - gape - upper * 0.45, g["upper_lip"] * 0.75 + 0.012) * arch * arch * 0.6
    lip_bump = lip_bump + bump(dy + gape * 1.25 + lower * 0.5, g["lower_lip"] * 0.75 + 0.012) * arch * arch

    s = (ax - g["eye_gap"] * 1.02 - g["brow_gap"]) / 0.17
    brow_y = g["eye_height"] + g["brow_height"] + g["brow_raise"] * 0.075
    brow_y = brow_y + (g["brow_tilt"] - g["brow_angle"] * 0.085) * s + g["brow_arch"] * (1 - s * s)
    thick = g["brow_thickness"] * (1.1 - 0.45 * ramp(-1.0, 1.0, s))
    brow = ramp(-0.013, 0.013, thick - (y - brow_y).abs()) * ramp(1.06, 0.9, s.abs()) * front
    brow_bump = bump(y - brow_y, thick + 0.015) * ramp(1.1, 0.7, s.abs()) * front

    # The beard's upper edge rises from the chin to the sideburns; it keeps clear of the lips.
    jaw_line = y + 0.45 - 0.52 * ramp(0.34, 0.66, ax)
    clear = ramp(0.03, 0.07, torch.maximum(ax - mouth_width - 0.03, dy.abs() - gape - g["lower_lip"] - 0.03) + 0.07)
    beard = ramp(0.08, -0.08, jaw_line) * ramp(-0.75, -0.1, z) * clear * g["beard"].clamp(0, 1)
    lip_gap = 0.45 * (g["eye_height"] - g["nose_length"] - 0.10 - g["mouth_height"])
    above = g["mouth_height"] + lip_gap + g["smile"] * 0.03 * u2
    moustache = ramp(0.02, -0.02, (y - above + 0.10 * u2 - 0.02).abs() - 0.042 * ramp(1.5, 0.6, u))
    moustache = moustache * ramp(1.35, 1.1, u) * front * g["moustache"]

    # Age: three forehead lines, folds from nose to mouth, bags under the eyes.
    forehead = bump(y - 0.44 - 0.02 * torch.cos(7 * x), 0.018) + bump(y - 0.53 - 0.02 * torch.cos(6 * x + 0.6), 0.018)
    forehead = forehead * ramp(0.36, 0.18, ax)
    nose_y = g["eye_height"] + 0.06 - g["nose_length"]
    along = ((nose_y + 0.02 - y) / (nose_y + 0.06 - g["mouth_height"])).clamp(0, 1)
    fold_x = g["nose_width"] + 0.075 + along * (mouth_width + 0.05 - g["nose_width"] - 0.075)
    fold = bump(ax - fold_x, 0.022) * ramp(0.0, 0.2, along) * ramp(1.0, 0.8, along)
    eye_r = torch.sqrt((ax - g["eye_gap"]) ** 2 + (y - g["eye_height"]) ** 2 + 1e-9)
    bag = bump(eye_r - g["eye_size"] * 1.32, 0.022) * ramp(-0.04, -0.12, y - g["eye_height"]) * 0.8
    wrinkle = (0.8 * forehead + fold + bag).clamp(max=1) * front * g["wrinkles"]
    return Paint(lips, inner, line, teeth, lip_bump * front, brow, brow_bump, beard, moustache, wrinkle, front)


def _skin(x: Tensor, y: Tensor, z: Tensor, ax: Tensor, g: dict[str, Tensor], paint: Paint) -> tuple[Tensor, Tensor]:
    """Head with nose, ears and lids, displaced by the painted fields; and the upper lid's cutting plane."""
    d = ellipsoid(x, y - 0.24, z + 0.10, g["skull_width"], 0.78 * g["skull_height"], 0.84)
    d = smooth_min(d, ellipsoid(x, y + 0.26, z - 0.10, g["face_width"], g["face_height"], 0.60), 0.30)
    d = smooth_min(d, ellipsoid(ax - g["jaw"], y + 0.50, z - 0.04, 0.17, 0.20, 0.26), 0.28)
    d = smooth_min(d, ellipsoid(x, y + g["chin_drop"], z - g["chin_depth"], g["chin_width"], 0.13, 0.13), 0.20)
    cheek_y = y + 0.17 - 0.05 * g["smile"].clamp(min=0)
    d = smooth_min(d, ellipsoid(ax - 0.33, cheek_y, z - 0.44, 0.14 + g["cheek"] * 0.5, 0.20, 0.10 + g["cheek"]), 0.18)
    d = smooth_max(d, -sphere(ax - g["eye_gap"], y - g["eye_height"] - 0.03, z - 0.98, 0.26 + g["socket"]), 0.16)

    ear_x = ax - g["skull_width"] * 0.97
    ear = ellipsoid(ear_x - 0.02, y - 0.02, z + 0.10, 0.055, 0.19 * g["ear"], 0.12 * g["ear"])
    ear = smooth_max(ear, -ellipsoid(ear_x - 0.07, y - 0.02, z + 0.06, 0.05, 0.12 * g["ear"], 0.07 * g["ear"]), 0.03)
    d = smooth_min(d, ear, 0.04)

    top = g["eye_height"] + 0.06
    t = ((top - y) / g["nose_length"]).clamp(0, 1)
    ridge_z = z - 0.66 - g["nose_depth"] * t * (0.35 + 0.65 * t)
    ridge_y = y - (top - t * g["nose_length"])
    nose = torch.sqrt(x * x + ridge_y**2 + ridge_z**2 + 1e-9)
    nose = nose - (g["nose_bridge"] + t * (g["nose_tip"] - g["nose_bridge"]) * 0.8)
    tip_y = y - top + g["nose_length"]
    nose = smooth_min(nose, sphere(x, tip_y, z - 0.66 - g["nose_depth"], g["nose_tip"]), 0.05)
    wing = ellipsoid(ax - g["nose_width"], tip_y + 0.015, z - 0.66 - g["nose_depth"] * 0.45, 0.065, 0.055, 0.085)
    d = smooth_min(d, smooth_min(nose, wing, 0.06), 0.09)

    # Lids: a slightly larger sphere than the eye, cut by two planes whose angles are the openness.
    qx, qy, qz = ax - g["eye_gap"], y - g["eye_height"], z - 0.57
    tilted = qy - g["eye_slant"] * qx
    shell = sphere(qx, qy, qz, g["eye_size"] * 1.10)
    upper = tilted * torch.cos(g["lid_upper"]) - qz * torch.sin(g["lid_upper"])
    lower = tilted * torch.cos(g["lid_lower"]) - qz * torch.sin(g["lid_lower"])
    lids = torch.minimum(torch.maximum(shell, -upper), torch.maximum(shell, lower))
    d = smooth_min(d, lids, 0.025)

    d = d - 0.030 * paint.lip_bump - 0.018 * paint.brow_bump - paint.beard * (0.03 + 0.05 * g["beard"])
    d = d - 0.035 * paint.moustache + 0.06 * paint.inner + 0.012 * paint.wrinkle
    return d * 0.92, upper  # the displacement makes the field steeper than 1: march a little shorter


def _hair_and_hat(x: Tensor, y: Tensor, z: Tensor, g: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Hair: an enlarged skull minus a plane (short) or plus a fall (long), minus the opening for the face."""
    width = g["skull_width"] + g["hair_side"]
    cap = ellipsoid(x, y - 0.26 - 0.3 * g["hair_top"], z + 0.14, width, 0.80 * g["skull_height"] + g["hair_top"] * 0.8,
                    0.88 + g["hair_side"])  # fmt: skip
    length = g["hair_length"]
    fall = ellipsoid(x, y + 0.15 + 0.35 * length, z + 0.38, width + 0.06 + 0.05 * length, 0.55 + 0.55 * length,
                     0.42 + 0.1 * length)  # fmt: skip
    cut = smooth_max(cap, -(y + 0.42 * z + 0.02 + 0.42 * length.clamp(min=0) + 0.30), 0.07)
    hair = torch.where(length > 0.35, smooth_min(cut, fall, 0.15), cut)
    face = ellipsoid(x - g["parting"] * (y + 0.2) * 0.9, y + 0.34 - 0.14 * (1 - g["fringe"]), z - 1.02,
                     g["skull_width"] * 0.78 + 0.13, 0.98 - 0.16 * g["fringe"], 0.78)  # fmt: skip
    hair = smooth_max(hair, -face, 0.07)
    hair = hair - g["curl"] * torch.sin(10 * x + 1.5) * torch.sin(10 * y) * torch.sin(10 * z + 0.7)
    hair = smooth_min(hair, sphere(x, y - 0.92 - g["hair_top"] * 0.8, z + 0.42, g["bun"]), 0.06)
    hair = (hair + g["no_hair"]) * 0.85

    brim = y - 0.42 + 0.11 * (z - 0.3)
    hat = ellipsoid(x, y - 0.30, z + 0.12, g["skull_width"] + 0.16, 0.86 * g["skull_height"] + 0.10, 0.99)
    hat = smooth_max(hat, -brim, 0.05)
    around = ellipsoid(x, torch.zeros_like(y), z + 0.12, g["skull_width"] + 0.17, 1.0, 1.00)
    hat = torch.minimum(hat, torch.sqrt(around**2 + (brim * 0.8) ** 2 + 1e-9) - 0.075) + (1 - g["hat"]) * 4
    hair = torch.where(g["hat"] > 0.5, smooth_max(hair, brim, 0.03), hair)
    return hair, hat


def _glasses(x: Tensor, y: Tensor, z: Tensor, ax: Tensor, g: dict[str, Tensor]) -> Tensor:
    """Two rings, a bridge and the temples."""
    front_z = 0.67 + g["eye_size"]
    gx, gy, gz = ax - g["eye_gap"] - 0.01, y - g["eye_height"], z - front_z
    radius = g["eye_size"] + 0.075
    ring = torch.sqrt((torch.sqrt(gx * gx + gy * gy + 1e-9) - radius) ** 2 + gz * gz + 1e-9) - 0.026
    inner = (x.abs() - (g["eye_gap"] - radius + 0.02).clamp(min=0)).clamp(min=0)
    bridge = torch.sqrt(inner**2 + (gy - 0.03) ** 2 + gz**2 + 1e-9) - 0.020
    over = (z - front_z).clamp(min=0) + (-0.2 - z).clamp(min=0)
    side = g["skull_width"] + 0.03
    side = side + (g["eye_gap"] + radius + 0.02 - side) * ramp(-0.2, 0.8, z)
    temple = torch.sqrt((ax - side) ** 2 + (gy - 0.03) ** 2 + over**2 + 1e-9) - 0.018
    return torch.minimum(torch.minimum(ring, bridge), temple) + (1 - g["glasses"]) * 4


def _body(x: Tensor, y: Tensor, z: Tensor, g: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Neck and shirt, in body space."""
    down = (-(y + 0.55)).clamp(0, 1.1)
    neck = torch.sqrt(x * x + (y + 0.55 + down) ** 2 + (z + 0.16 + 0.1 * down) ** 2 + 1e-9)
    neck = neck - g["neck"] * (1 + 0.12 * down)
    torso = ellipsoid(x, y + 2.05, z + 0.22, 1.10, 0.72, 0.46)
    torso = smooth_min(torso, ellipsoid(x.abs() - 0.72, y + 1.82, z + 0.22, 0.34, 0.34, 0.34), 0.3)
    collar = torch.sqrt(x * x + (z + 0.20) ** 2 + 1e-9) - g["neck"] * 1.18
    collar = torch.sqrt(collar**2 + (y + 1.36 + 0.25 * (z + 0.2)) ** 2 * 0.7 + 1e-9) - 0.075
    return neck, smooth_min(torso, collar, 0.06)


def to_head(x: Tensor, y: Tensor, z: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Body space -> head space; ``rotation`` [B, 9, 1] row-major, applied transposed (its inverse) about the pivot."""
    x, y, z = x - PIVOT[0], y - PIVOT[1], z - PIVOT[2]
    r = rotation
    return (
        r[:, 0] * x + r[:, 3] * y + r[:, 6] * z + PIVOT[0],
        r[:, 1] * x + r[:, 4] * y + r[:, 7] * z + PIVOT[1],
        r[:, 2] * x + r[:, 5] * y + r[:, 8] * z + PIVOT[2],
    )


def parts(x: Tensor, y: Tensor, z: Tensor, rotation: Tensor, shape: Tensor) -> Parts:
    """All parts at the body-space points (x, y, z), each [B, R]."""
    g = {name: shape[:, i] for i, name in enumerate(SHAPE)}
    hx, hy, hz = to_head(x, y, z, rotation)
    ax = torch.sqrt(hx * hx + 4e-4)
    paint = paint_fields(hx, hy, hz, g)
    skin, upper_lid = _skin(hx, hy, hz, ax, g, paint)
    eye = sphere(ax - g["eye_gap"], hy - g["eye_height"], hz - 0.57, g["eye_size"])
    hair, hat = _hair_and_hat(hx, hy, hz, g)
    neck, torso = _body(x, y, z, g)
    return Parts(skin, eye, hair, torso, _glasses(hx, hy, hz, ax, g), hat, neck, upper_lid, paint)


def distance(x: Tensor, y: Tensor, z: Tensor, rotation: Tensor, shape: Tensor) -> Tensor:
    """Distance to the whole figure [B, R]."""
    p = parts(x, y, z, rotation, shape)
    body = torch.minimum(smooth_min(p.skin, p.neck, 0.12), p.eye)
    return torch.minimum(torch.minimum(body, torch.minimum(p.hair, p.torso)), torch.minimum(p.glasses, p.hat))
