"""Identity latents and what they mean.

A person is a row z ~ N(0, 1)^D. The standard normal distribution function maps every coordinate to (0, 1), and each
named coordinate is then mapped to a length (in head units, about 11 cm), a ratio or a colour.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Ranges (low, high) of the parameters that are linear in their coordinate. Head units; the skull is about 1.5 wide.
# They are kept inside what still reads as an ordinary, likeable person: no needle noses, no permanent scowl.
RANGES: dict[str, tuple[float, float]] = {
    "skull_width": (0.61, 0.78), "skull_height": (0.94, 1.10), "face_width": (0.48, 0.66), "face_height": (0.61, 0.74),
    "jaw": (0.18, 0.44), "chin_width": (0.11, 0.28), "chin_drop": (0.71, 0.88), "chin_depth": (0.36, 0.52),
    "cheek": (0.10, 0.24), "nose_length": (0.18, 0.34), "nose_depth": (0.08, 0.25), "nose_width": (0.06, 0.17),
    "nose_tip": (0.065, 0.130), "nose_bridge": (0.035, 0.080), "eye_gap": (0.23, 0.325), "eye_size": (0.145, 0.200),
    "eye_height": (0.01, 0.11), "eye_slant": (-0.28, 0.28), "lid": (0.40, 0.90), "socket": (0.0, 0.05),
    "brow_height": (0.21, 0.30), "brow_thickness": (0.016, 0.052), "brow_arch": (0.00, 0.07),
    "brow_tilt": (-0.05, 0.03),
    "brow_gap": (0.0, 0.04), "mouth_height": (-0.55, -0.45), "mouth_width": (0.16, 0.28), "upper_lip": (0.020, 0.062),
    "lower_lip": (0.028, 0.078), "ear": (0.75, 1.25), "neck": (0.23, 0.36), "hair_side": (0.04, 0.16),
    "hair_top": (0.05, 0.26), "hair_length": (0.0, 1.0), "fringe": (0.0, 1.0), "parting": (-0.5, 0.5),
    "curl": (0.0, 0.05),
}  # fmt: skip
# Coordinates with a meaning of their own (thresholds, ramps), see :func:`describe`.
SPECIAL: tuple[str, ...] = (
    "skin_tone", "skin_red", "iris_tone", "hair_tone", "beard", "beard_length", "moustache", "bald", "bun", "freckles",
    "mole", "mole_x", "mole_y", "age",
)  # fmt: skip
COORDINATES: tuple[str, ...] = (*RANGES, *SPECIAL)
DIMENSIONS = len(COORDINATES)
"""D, the length of an identity latent."""

_SKIN = (
    (0.97, 0.78, 0.68),
    (0.94, 0.70, 0.56),
    (0.85, 0.59, 0.42),
    (0.69, 0.44, 0.29),
    (0.50, 0.31, 0.20),
    (0.34, 0.20, 0.135),
)
_HAIR = (
    (0.035, 0.028, 0.03),
    (0.13, 0.07, 0.04),
    (0.30, 0.16, 0.07),
    (0.45, 0.14, 0.05),
    (0.72, 0.50, 0.22),
    (0.86, 0.74, 0.48),
)
_IRIS = (
    (0.12, 0.06, 0.03),
    (0.30, 0.16, 0.06),
    (0.35, 0.33, 0.10),
    (0.16, 0.38, 0.18),
    (0.15, 0.36, 0.62),
    (0.45, 0.55, 0.62),
)
_GREY = (0.74, 0.74, 0.76)


def sample_people(n: int, seed: int) -> Tensor:
    """``n`` identity latents [n, D], the same for the same seed on every machine (drawn on the CPU)."""
    return torch.randn(n, DIMENSIONS, generator=torch.Generator().manual_seed(seed))


def _ramp(table: tuple[tuple[float, ...], ...], t: Tensor) -> Tensor:
    """Piecewise linear colour table at ``t`` in (0, 1): [n] -> [n, 3]."""
    colours = torch.tensor(table, device=t.device, dtype=t.dtype)
    at = t.clamp(0, 0.9999) * (len(table) - 1)
    low = at.floor().long()
    weight = (at - low)[:, None]
    return colours[low] * (1 - weight) + colours[(low + 1).clamp(max=len(table) - 1)] * weight


def _step(low: float, high: float, x: Tensor) -> Tensor:
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def describe(people: Tensor) -> dict[str, Tensor]:
    """Latents [n, D] to named parameters: lengths and ratios [n], colours [n, 3] (linear RGB, 0..1)."""
    uniform = torch.special.ndtr(people.float())
    u = {name: uniform[:, i] for i, name in enumerate(COORDINATES)}
    p = {name: low + (high - low) * u[name] for name, (low, high) in RANGES.items()}

    bald = u["bald"] < 0.08
    p["no_hair"] = bald.float() * 3.0
    # Two clusters, short and long: what lies between looks like a helmet.
    length = u["hair_length"]
    p["hair_length"] = torch.where(length < 0.5, -0.2 + 1.06 * length, 0.40 + 1.5 * (length - 0.5))
    # The top quarter of `curl` is a round afro: more volume as well as more waves.
    curl = ((u["curl"] - 0.45) / 0.55).clamp(min=0)
    afro = ((u["curl"] - 0.74) / 0.26).clamp(min=0)
    p["curl"] = 0.040 * curl
    p["hair_side"] = p["hair_side"] + 0.15 * afro
    p["hair_top"] = p["hair_top"] + 0.10 * afro
    p["bun"] = torch.where(
        (u["bun"] > 0.86) & ~bald, 0.20 + 0.10 * (u["bun"] - 0.86) / 0.14, torch.full_like(u["bun"], -1.0)
    )

    short = (length < 0.5).float()  # beards go with short hair here: easier to read as a person at 128 px
    beard = (u["beard"] > 0.60).float() * short
    p["beard"] = beard * (0.90 + 0.10 * u["beard_length"])
    p["moustache"] = ((u["moustache"] > 0.70).float() * short).maximum(beard)
    p["freckles"] = ((u["freckles"] - 0.78) * 4.5).clamp(min=0)
    p["mole"] = (u["mole"] > 0.80).float()
    p["mole_x"] = (u["mole_x"] - 0.5) * 0.8
    p["mole_y"] = -0.55 + 0.45 * u["mole_y"]

    age = u["age"]
    p["wrinkles"] = _step(0.62, 1.0, age)
    grey = _step(0.70, 0.80, age)[:, None]
    skin = _ramp(_SKIN, u["skin_tone"])
    p["skin"] = (skin + (u["skin_red"][:, None] - 0.5) * skin.new_tensor([0.06, -0.04, -0.04])).clamp(0.02, 1)
    # Fair hair is rarer on dark skin.
    hair = _ramp(_HAIR, u["hair_tone"] * (1 - 0.45 * u["skin_tone"]))
    p["hair"] = hair + (hair.new_tensor(_GREY) - hair) * grey
    p["iris"] = _ramp(_IRIS, u["iris_tone"] * (1 - 0.3 * u["skin_tone"]))
    p["lips"] = (p["skin"] * skin.new_tensor([0.88, 0.56, 0.56]) + skin.new_tensor([0.08, 0.0, 0.02])).clamp(0, 1)
    return p


PARAMETERS: tuple[str, ...] = (*COORDINATES, *(f"{part}_{c}" for part in ("skin", "hair", "iris") for c in "rgb"),
                               "bun_size", "beard_on", "moustache_on", "hair_drop", "afro", "grey")  # fmt: skip
"""Names of the columns of :func:`identity_parameters`."""


def identity_parameters(people: Tensor) -> Tensor:
    """Regression targets [n, K] of about unit variance: every coordinate made uniform, and what it turns into.

    The visible results (colours, beard or none, hair length) stand beside the raw coordinates because a recogniser can
    only ever learn what shows.
    """
    p = describe(people)
    uniform = (torch.special.ndtr(people.float()) - 0.5) * 12**0.5
    curl = torch.special.ndtr(people[:, COORDINATES.index("curl")].float())
    age = torch.special.ndtr(people[:, COORDINATES.index("age")].float())
    # (value - centre) * factor, rough constants so that no statistics need to be stored.
    extra = torch.stack(
        [
            (p["bun"] + 0.83) * 2.3, (p["beard"] - 0.19) * 2.5, (p["moustache"] - 0.26) * 2.3,
            (p["hair_length"] - 0.42) * 2.2, ((curl - 0.74).clamp(min=0) - 0.034) * 14,
            (_step(0.70, 0.80, age) - 0.25) * 2.3,
        ], 1,
    )  # fmt: skip
    colours = torch.cat([(p["skin"] - 0.5) * 4, (p["hair"] - 0.35) * 3.5, (p["iris"] - 0.25) * 6], 1)
    return torch.cat([uniform, colours, extra], 1)
