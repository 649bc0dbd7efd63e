"""Settings for :func:`idgen.load` that fit a small GPU, with the peak to expect.

The peaks are computed, not measured: full-size models on the meta device, every live tensor counted
(:mod:`idgen.bench.memory`), bfloat16, one picture of 1024 x 1024, plus 0.7 GiB for the CUDA context and workspaces, and
the caches of prompts and people when they are full (64 MiB each). No preset decodes beside the next denoising.
``benchmarks/speed_memory.py`` computes them again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from idgen.errors import BadRequest
from idgen.speed import Levers


@dataclass(frozen=True)
class Card:
    """One preset."""

    peak: float
    """GiB expected at 1024 x 1024, batch 1"""
    settings: dict[str, Any] = field(default_factory=dict)
    """for :func:`idgen.load`"""


_SMALL: dict[str, Any] = {"dtype": "bfloat16", "vae_tiling": True}
# Fused projections are copies: 0.6 GiB for SDXL's UNet, 0.3 GiB for IdentityNet.
_THRIFTY = {**_SMALL, "speed": Levers(lean=False)}

CARDS: dict[str, dict[int, Card]] = {
    "instantid": {
        16: Card(11.6, {**_SMALL}),
        12: Card(9.1, {**_THRIFTY, "offload": "model"}),
        8: Card(4.3, {**_THRIFTY, "offload": "sequential"}),
    },
    "ip-adapter": {
        16: Card(8.9, {**_SMALL}),
        12: Card(8.9, {**_SMALL}),
        8: Card(6.6, {**_THRIFTY, "offload": "model"}),
    },
}
"""pipeline -> card in GB -> preset, on SDXL. ``ip-adapter`` stands for every pipeline without a ControlNet; those with
an image encoder (Plus, FaceID-Plus) need 1.2 GiB more. SD1.5 needs 3.1 GiB and no preset."""


def card_settings(pipeline: str, gigabytes: int) -> dict[str, Any]:
    """``idgen.load("instantid", **card_settings("instantid", 12))``

    Args:
        gigabytes: of the card; the largest preset that is not above it is taken.
    Raises:
        BadRequest: the card is below 8 GB.
    """
    presets = CARDS["instantid" if "instantid" in pipeline else "ip-adapter"]
    fitting = [size for size in presets if size <= gigabytes]
    if not fitting:
        raise BadRequest(f"SDXL needs a card of 8 GB or more, not {gigabytes}; use base='sd15' or 'mini'.", "gigabytes")
    return dict(presets[max(fitting)].settings)
