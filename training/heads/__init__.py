"""Synthetic heads: a batched renderer of procedural people, in plain torch, deterministic by seed.

>>> people = sample_people(4, seed=1)
>>> pictures = render(people, sample_nuisances(4, seed=2, pose="front"))
>>> pictures.images.shape
torch.Size([4, 3, 128, 128])
"""

from .nuisances import (
    ATTRIBUTES,
    COLOURS,
    EXPRESSIONS,
    LIGHTS,
    POSES,
    STYLES,
    SWITCH,
    Nuisances,
    caption,
    caption_parts,
    sample_nuisances,
)
from .people import DIMENSIONS, PARAMETERS, describe, identity_parameters, sample_people
from .render import Renders, landmarks, render

__all__ = [
    "ATTRIBUTES",
    "COLOURS",
    "DIMENSIONS",
    "EXPRESSIONS",
    "LIGHTS",
    "PARAMETERS",
    "POSES",
    "STYLES",
    "SWITCH",
    "Nuisances",
    "Renders",
    "caption",
    "caption_parts",
    "describe",
    "identity_parameters",
    "landmarks",
    "render",
    "sample_nuisances",
    "sample_people",
]
