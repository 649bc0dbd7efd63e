"""Which of the manifest's bases a backbone is like, so that it gets the weights and the defaults that fit it."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from idgen.weights.store import mini_dir

if TYPE_CHECKING:
    from idgen.backbone import Backbone

BASES = ("sdxl", "sd15", "mini-xl", "mini-sd15")
"""the bases that the manifest knows"""


def base_name(backbone: Backbone) -> str:
    """One of :data:`BASES`: its own name; of a base by path the mini one whose UNet is as wide in every block and in
    its context, since adapters are made to these widths, else the public one of its family."""
    if backbone.source in BASES:
        return backbone.source
    own = _widths(backbone.unet.config)
    return next((name for name in ("mini-xl", "mini-sd15") if own == _widths_of(name)), backbone.family)


@lru_cache(maxsize=2)
def _widths_of(mini: str) -> Any:
    folder = mini_dir()
    if folder is None:  # a copy of idgen without mini
        return None
    return _widths(json.loads((folder / mini / "unet" / "config.json").read_text(encoding="utf-8")))


def _widths(config: Any) -> tuple[int, tuple[int, ...]]:
    return config["cross_attention_dim"], tuple(config["block_out_channels"])
