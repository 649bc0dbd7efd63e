"""Everything of a picture that is not the person: pose, expression, light, colours, glasses, hat, style; and
captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EXPRESSIONS = ("neutral", "smiling", "laughing", "surprised", "sad", "angry", "sleeping")
POSES = ("front", "left", "right", "up", "down", "tilted")
LIGHTS = ("soft", "left", "right", "warm", "cold", "top")
STYLES = ("photo", "sketch", "statue", "comic", "painting")
SWITCH = ("no", "yes")
COLOUR_VALUES: dict[str, tuple[float, float, float]] = {
    "red": (.80, .10, .09), "orange": (.95, .46, .08), "yellow": (.95, .82, .18), "green": (.14, .56, .22),
    "blue": (.10, .27, .80), "purple": (.46, .18, .66), "pink": (.96, .52, .70), "white": (.93, .93, .93),
    "gray": (.48, .48, .48), "black": (.05, .05, .06),
}  # fmt: skip
COLOURS = tuple(COLOUR_VALUES)
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "expression": EXPRESSIONS, "pose": POSES, "light": LIGHTS, "background": COLOURS, "shirt": COLOURS,
    "glasses": SWITCH, "hat": SWITCH, "hat_colour": COLOURS, "style": STYLES,
}  # fmt: skip
"""Attribute name -> names of its classes, in the order of the class indices."""

EXPRESSION_WORDS = ("with a neutral face", "smiling", "laughing", "looking surprised", "looking sad", "looking angry",
                    "with closed eyes")  # fmt: skip
POSE_WORDS = ("facing the camera", "looking left", "looking right", "looking up", "looking down", "with tilted head")
LIGHT_WORDS = (
    "soft light",
    "light from the left",
    "light from the right",
    "warm light",
    "cold light",
    "light from above",
)
STYLE_WORDS = ("a photo of a person", "a pencil sketch of a person", "a marble statue of a person",
               "a comic drawing of a person", "an oil painting of a person")  # fmt: skip

DEFAULT_STYLE_SHARES = (0.72, 0.07, 0.07, 0.07, 0.07)


@dataclass
class Nuisances:
    """One batch of circumstances.

    ``labels``: attribute name -> class indices [n] (int64). ``values``: what the renderer needs, each [n] (float):
    angles in radians, light direction and colours, offsets in head units.
    """

    labels: dict[str, Tensor]
    values: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.labels["pose"])

    def to(self, device: torch.device | str) -> Nuisances:
        """The same batch on another device."""
        return Nuisances(
            {k: v.to(device) for k, v in self.labels.items()}, {k: v.to(device) for k, v in self.values.items()}
        )

    def __getitem__(self, index: Any) -> Nuisances:
        """A part of the batch (slice or index tensor)."""
        return Nuisances({k: v[index] for k, v in self.labels.items()}, {k: v[index] for k, v in self.values.items()})


def sample_nuisances(
    n: int, seed: int, *, jitter: float = 1.0, style_shares: tuple[float, ...] = DEFAULT_STYLE_SHARES, **fixed: Any
) -> Nuisances:
    """Draw ``n`` circumstances, the same for the same seed.

    ``fixed`` pins attributes: a class name (``pose="left"``), an index, a bool for the switches, or a tensor [n].
    ``jitter`` scales the variation inside a class (0: the class centre). Raises ValueError for an unknown name.
    """
    g = torch.Generator().manual_seed(seed)
    labels = _sample_labels(n, g, style_shares)
    for name, value in fixed.items():
        if name not in ATTRIBUTES:
            raise ValueError(f"unknown attribute {name!r}; there are {', '.join(ATTRIBUTES)}")
        if isinstance(value, str):
            if value not in ATTRIBUTES[name]:
                raise ValueError(f"unknown {name} {value!r}; there are {', '.join(ATTRIBUTES[name])}")
            value = ATTRIBUTES[name].index(value)
        labels[name] = torch.as_tensor(value, dtype=torch.long).cpu().expand(n).clone()
    return Nuisances(labels, _values(labels, g, jitter))


def _sample_labels(n: int, g: torch.Generator, style_shares: tuple[float, ...]) -> dict[str, Tensor]:
    def classes(name: str, first: float = 0.0) -> Tensor:
        """Uniform over the classes, with an extra share for the first."""
        k = torch.randint(0, len(ATTRIBUTES[name]), (n,), generator=g)
        return torch.where(torch.rand(n, generator=g) < first, torch.zeros_like(k), k)

    labels = {
        "expression": classes("expression", 0.2), "pose": classes("pose", 0.3), "light": classes("light", 0.3),
        "background": classes("background"), "shirt": classes("shirt"),
        "glasses": (torch.rand(n, generator=g) < 0.22).long(), "hat": (torch.rand(n, generator=g) < 0.22).long(),
        "hat_colour": classes("hat_colour"),
    }  # fmt: skip
    labels["style"] = torch.multinomial(torch.tensor(style_shares), n, True, generator=g)
    return labels


def _values(labels: dict[str, Tensor], g: torch.Generator, jitter: float) -> dict[str, Tensor]:
    n = len(labels["pose"])

    def around(half_width: float, *shape: int) -> Tensor:
        return (torch.rand(n, *shape, generator=g) - 0.5) * (2 * half_width * jitter)

    def pick(table: list[Any], name: str) -> Tensor:
        return torch.tensor(table, dtype=torch.float)[labels[name]]

    v: dict[str, Tensor] = {}
    v["yaw"] = pick([0, -0.55, 0.55, 0, 0, 0], "pose") + around(0.13)
    v["pitch"] = pick([0, 0, 0, -0.36, 0.34, 0], "pose") + around(0.08)
    v["roll"] = pick([0, 0, 0, 0, 0, 0.30], "pose") + around(0.05)
    # A neutral mouth is lifted a little: flat mouths look grumpy on these heads.
    v["smile"] = pick([0.12, 1.0, 1.1, 0.1, -1.0, -0.55, 0.25], "expression") + around(0.12)
    v["open"] = pick([0, 0, 0.75, 1.0, 0, 0.05, 0], "expression") * (1 + around(0.15))
    v["close_eyes"] = pick([0, 0.04, 0.12, -0.3, 0.12, 0.10, 1.0], "expression")
    v["brow_raise"] = pick([0, 0.1, 0.25, 1.0, 0.2, -0.5, 0], "expression")
    v["brow_angle"] = pick([0, 0, 0, 0, 1.0, -1.0, 0], "expression")
    direction = pick(
        [
            [0.25, 0.45, 0.85],
            [-0.95, 0.25, 0.45],
            [0.95, 0.25, 0.45],
            [0.45, 0.4, 0.8],
            [-0.45, 0.4, 0.8],
            [0.05, 1, 0.25],
        ],
        "light",
    ) + torch.cat([around(0.12, 2), around(0.08, 1)], 1)
    v["light_x"], v["light_y"], v["light_z"] = F.normalize(direction, dim=1).unbind(1)
    tint = pick(
        [[1, 0.98, 0.95], [1, 0.98, 0.95], [1, 0.98, 0.95], [1.12, 0.86, 0.62], [0.72, 0.88, 1.14], [1, 1, 1]], "light"
    )
    v["light_r"], v["light_g"], v["light_b"] = tint.unbind(1)
    v["ambient"] = pick([0.52, 0.30, 0.30, 0.38, 0.38, 0.34], "light")
    colours = torch.tensor(list(COLOUR_VALUES.values()))
    for part, name in (("background", "background"), ("shirt", "shirt"), ("hat", "hat_colour")):
        rgb = (colours[labels[name]] + around(0.03, 3)).clamp(0.02, 1)
        v[f"{part}_r"], v[f"{part}_g"], v[f"{part}_b"] = rgb.unbind(1)
    v["scale"] = 0.99 + around(0.05)
    v["shift_x"], v["shift_y"] = around(0.05), around(0.04)
    v["glasses"], v["hat"] = labels["glasses"].float(), labels["hat"].float()
    return v


def caption_parts(labels: dict[str, Tensor], i: int) -> tuple[str, dict[str, str]]:
    """The caption of row ``i`` in pieces: its head ("a photo of a person") and attribute name -> phrase.

    Only what shows is named: a pencil sketch has no colours, a statue no shirt colour.
    """
    label = {k: int(v[i]) for k, v in labels.items()}
    style = STYLES[label["style"]]
    colourless = style in ("sketch", "statue")
    parts = {"expression": EXPRESSION_WORDS[label["expression"]], "pose": POSE_WORDS[label["pose"]]}
    if not colourless:
        parts["shirt"] = f"wearing a {COLOURS[label['shirt']]} shirt"
    if label["glasses"]:
        parts["glasses"] = "wearing glasses"
    if label["hat"]:
        parts["hat"] = "wearing a hat" if colourless else f"wearing a {COLOURS[label['hat_colour']]} hat"
    parts["light"] = LIGHT_WORDS[label["light"]]
    if style != "sketch":
        parts["background"] = f"{COLOURS[label['background']]} background"
    return STYLE_WORDS[label["style"]], parts


def caption(labels: dict[str, Tensor], i: int) -> str:
    """The full caption of row ``i``, phrases separated by commas."""
    head, parts = caption_parts(labels, i)
    return ", ".join([head, *parts.values()])
