"""Which requests may share one UNet call."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from idgen.identity import Identity
from idgen.request import Request

if TYPE_CHECKING:
    from idgen.pipeline import Pipeline

DECIDED = ("width", "height", "steps", "guidance", "scheduler")
GIVEN = ("strength", "structure_start", "structure_end", "guess_mode")
"""Fields that all requests of one call must agree on, those with defaults as decided by the pipeline; see
:meth:`idgen.pipeline.Pipeline.generate_many`."""

OPTIONAL = ("image", "mask", "reference", "image_embedding")
"""Inputs that all requests of one call have, or none."""

log = logging.getLogger("idgen.engine")

SURELY_LONG = 1000
"""characters, beyond which a prompt is not counted in tokens to know that it needs several chunks: counting takes the
longer the longer it is, and a wrong guess (few words are so long) costs no more than a UNet call of its own"""


def batch_key(pipeline: Pipeline, request: Request) -> Hashable:
    """Requests with equal keys fit together. ``pipeline``: the resident pipeline that runs them."""
    # A pose picture may decide the size, so without a size such a request runs alone.
    alone = id(request) if request.pose is not None and request.width is None else None
    # Whoever names a default asks for the same as who leaves it open.
    decided = pipeline.settings(request.change(pose=None))
    shared = (*(decided[name] for name in DECIDED), *(getattr(request, name) for name in GIVEN))
    present = tuple(getattr(request, name) is None for name in OPTIONAL)
    long = _long_words(pipeline, decided["prompt"], decided["negative_prompt"])
    return pipeline.name, shared, present, _count(request.who), alone, long


def key_or_alone(pipeline: Pipeline, request: Request, alone: str) -> Hashable:
    """:func:`batch_key`, or ``alone``, a name that no other request has: by itself, a request that breaks here meets
    its own error where that is answered."""
    try:
        return batch_key(pipeline, request)
    except Exception as error:
        log.warning("a request runs alone, for what it may share a UNet call with cannot be told: %s", error)
        return alone


def _long_words(pipeline: Pipeline, *prompts: str | None) -> tuple[str, ...]:
    """The prompts, where one needs several chunks: a short one beside it would be filled up with empty chunks, which
    attention sees."""
    from idgen.text import fits

    words = tuple(text for text in prompts if text)
    long = any(len(text) > SURELY_LONG or not fits(pipeline.backbone, text) for text in words)
    return words if long else ()


def _count(who: Any) -> int:
    """How many photos or embeddings speak for the person: methods that keep them apart cannot batch unequal ones."""
    if isinstance(who, Identity):
        return 1 if who.embedding.ndim == 1 else len(who.embedding)
    return len(who) if isinstance(who, (list, tuple)) else int(who is not None)
