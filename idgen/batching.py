"""Which requests may share one UNet call."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from idgen.identity import Identity
from idgen.request import Request

SHARED = (
    *("width", "height", "steps", "guidance", "scheduler"),
    *("strength", "structure_start", "structure_end", "guess_mode"),
)
"""Fields that all requests of one call must agree on; see :meth:`idgen.pipeline.Pipeline.generate_many`."""

OPTIONAL = ("image", "mask", "reference", "image_embedding")
"""Inputs that all requests of one call have, or none."""


def batch_key(pipeline: str, request: Request) -> Hashable:
    """Requests with equal keys fit together. ``pipeline``: the name of the resident pipeline that runs them."""
    # A pose picture may decide the size, so without a size such a request runs alone.
    alone = id(request) if request.pose is not None and request.width is None else None
    shared = tuple(getattr(request, name) for name in SHARED)
    present = tuple(getattr(request, name) is None for name in OPTIONAL)
    return pipeline, shared, present, _count(request.who), alone


def _count(who: Any) -> int:
    """How many photos or embeddings speak for the person: methods that keep them apart cannot batch unequal ones."""
    if isinstance(who, Identity):
        return 1 if who.embedding.ndim == 1 else len(who.embedding)
    return len(who) if isinstance(who, (list, tuple)) else int(who is not None)
