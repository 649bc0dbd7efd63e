"""Colours and masks of the surface points: skin, eyes, hair, cloth, painted features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import SHAPE, parts, ramp, to_head

PALETTE: tuple[str, ...] = (
    *(f"{part}_{c}" for part in ("skin", "hair", "lips", "iris", "shirt", "hat") for c in "rgb"),
    "freckles", "mole", "mole_x", "mole_y",
)  # fmt: skip
"""Columns of the palette tensor [B, len(PALETTE), 1]."""


def pack_palette(person: dict[str, Tensor], values: dict[str, Tensor]) -> Tensor:
    """Colours of the person and of the clothes -> [B, len(PALETTE), 1]."""
    columns = [person[part][:, k] for part in ("skin", "hair", "lips", "iris") for k in range(3)]
    columns += [values[f"{part}_{c}"] for part in ("shirt", "hat") for c in "rgb"]
    columns += [person[k] for k in ("freckles", "mole", "mole_x", "mole_y")]
    return torch.stack(columns, 1)[:, :, None].contiguous()


class Surface(NamedTuple):
    """Albedo (three [B, R], linear), carving depth for statues and masks of the parts, [B, R] in 0..1."""

    red: Tensor
    green: Tensor
    blue: Tensor
    carve: Tensor
    eye: Tensor
    hair: Tensor
    cloth: Tensor
    glasses: Tensor
    lips: Tensor
    face: Tensor


def _mix(a: Tensor, b: Tensor | float, t: Tensor) -> Tensor:
    return a + (b - a) * t


def surface(x: Tensor, y: Tensor, z: Tensor, rotation: Tensor, shape: Tensor, palette: Tensor) -> Surface:
    """What the surface looks like at the body-space points (x, y, z), each [B, R]."""
    hx, hy, hz = to_head(x, y, z, rotation)
    p = parts(x, y, z, rotation, shape)
    paint = p.paint
    g = {name: shape[:, i] for i, name in enumerate(SHAPE)}
    c = {name: palette[:, i] for i, name in enumerate(PALETTE)}
    ax = torch.sqrt(hx * hx + 4e-4)

    nose_y = hy - g["eye_height"] - 0.06 + g["nose_length"]
    flush = torch.exp(-((ax - 0.36) ** 2 + (hy + 0.22) ** 2) / 0.03) * 0.45
    flush = flush + torch.exp(-(hx**2 + nose_y**2) / 0.012) * 0.35
    spots = torch.sin(50 * hx + 3 * torch.sin(19 * hy)) * torch.sin(46 * hy + 4 * torch.sin(16 * hx))
    spots = ramp(0.5, 0.8, spots) * torch.exp(-((ax - 0.27) ** 2 / 0.06 + (hy + 0.14) ** 2 / 0.02))
    spots = spots * c["freckles"] * paint.front
    mole = ramp(0.040, 0.022, torch.sqrt((hx - c["mole_x"]) ** 2 + (hy - c["mole_y"]) ** 2)) * paint.front * c["mole"]
    near_eye = (p.eye < 0.05) & (p.eye > -0.02)
    lash = ramp(0.036, 0.014, p.upper_lid.abs()) * near_eye.to(x.dtype) * paint.front
    lid_shade = (p.eye < 0.03).to(x.dtype) * 0.10

    r = torch.sqrt((hx.abs() - g["eye_gap"]) ** 2 + (hy - g["eye_height"]) ** 2 + 1e-9) / g["eye_size"]
    iris, pupil, rim = ramp(0.62, 0.54, r), ramp(0.32, 0.25, r), ramp(0.47, 0.56, r)
    glint = torch.sqrt((hx - torch.sign(hx) * g["eye_gap"] + 0.05) ** 2 + (hy - g["eye_height"] - 0.055) ** 2)
    glint = ramp(0.060, 0.036, glint)

    # Strands: low contrast and low frequency, so that 128 px and an autoencoder can carry them.
    turn = torch.atan2(hx - g["parting"] * 0.6, hz + 0.25)
    strand = 0.5 + 0.5 * torch.sin(20 * turn + 4 * torch.sin(3.1 * hy + 2 * hx) + 1.5 * torch.sin(7 * hx + 3 * hz))
    whisker = 0.5 + 0.5 * torch.sin(26 * hy + 18 * hx * torch.sign(hx) + 2 * torch.sin(15 * hx))

    m_eye = (p.eye < torch.minimum(p.skin, torch.minimum(p.hair, p.neck))).to(x.dtype)
    nearest = torch.minimum(torch.minimum(p.skin, p.neck), p.eye)
    m_hair = (p.hair < nearest).to(x.dtype)
    nearest = torch.minimum(nearest, p.hair)
    m_torso = (p.torso < nearest).to(x.dtype)
    nearest = torch.minimum(nearest, p.torso)
    m_glasses = (p.glasses < nearest).to(x.dtype)
    m_hat = (p.hat < torch.minimum(nearest, p.glasses)).to(x.dtype)
    rib = 0.5 + 0.5 * torch.sin(34 * torch.atan2(hx, hz + 0.12))

    rgb: list[Tensor] = []
    for k, ch in enumerate("rgb"):
        hair, lips, iris_c = c[f"hair_{ch}"], c[f"lips_{ch}"], c[f"iris_{ch}"]
        v = c[f"skin_{ch}"] * (1 - flush * (0.0, 0.28, 0.28)[k])
        v = v * (1 - spots * (0.25, 0.42, 0.55)[k]) * (1 - 0.8 * mole) * (1 - lid_shade * (0.5, 1.0, 1.0)[k])
        v = v * (1 - paint.wrinkle * (0.26, 0.34, 0.36)[k])
        v = _mix(v, hair * (0.82 + 0.25 * whisker), (paint.beard * 0.93).clamp(0, 1))
        v = _mix(_mix(v, lips, paint.lips), lips * 0.35, paint.line * 0.8)
        v = _mix(_mix(v, (0.22, 0.04, 0.04)[k], paint.inner), 0.93, paint.teeth)
        v = _mix(v, hair * (0.80 + 0.25 * whisker), paint.moustache * 0.95)
        v = _mix(v, hair * 0.75, paint.brow * 0.92)
        v = _mix(v, 0.03, lash * 0.9)
        eye = _mix(torch.full_like(v, 0.93), _mix(iris_c * 1.25, iris_c * 0.35, rim), iris)
        eye = _mix(_mix(eye, 0.015, pupil), 1.25, glint)
        v = _mix(v, eye, m_eye)
        v = _mix(v, hair * (0.84 + 0.28 * strand), m_hair)
        v = _mix(v, c[f"shirt_{ch}"], m_torso)
        v = _mix(v, 0.05, m_glasses)
        rgb.append(_mix(v, c[f"hat_{ch}"] * (0.85 + 0.20 * rib), m_hat))

    bare = (1 - m_eye) * (1 - m_hair)
    carve = 1 - m_hair * (0.25 * (1 - strand)) - m_eye * (0.45 * pupil + 0.15 * rim * iris)
    drawn = 0.22 * paint.brow + 0.35 * paint.inner + 0.30 * paint.line + 0.15 * paint.lips + 0.30 * lash
    drawn = drawn + 0.2 * paint.beard * whisker + 0.2 * paint.moustache + 0.15 * paint.wrinkle
    face = bare * (1 - m_torso) * (1 - m_glasses) * (1 - m_hat) * (p.skin < p.neck + 0.02).to(x.dtype) + m_eye
    red, green, blue = rgb
    cloth, lips = m_torso + m_hat, paint.lips * bare
    return Surface(red, green, blue, carve - bare * drawn, m_eye, m_hair, cloth, m_glasses, lips, face)
