"""From the page's fields to a request. No Gradio here."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from idgen.demo.people import Sitting
from idgen.demo.styles import pixels, styles
from idgen.errors import BadRequest, NoFaceFound
from idgen.request import Request

if TYPE_CHECKING:
    from idgen.demo.limits import LimitedEngine, Limits
    from idgen.demo.offers import Offer
    from idgen.demo.session import Session, Shot
    from idgen.faces import FaceExtractor

SEEDS = 10**6
"""Seeds that the dice throws: short ones can be read out and typed. Any other may be entered."""
VARIATION = 0.6
"""Strength of "more like this": the composition stays, the rest is made anew."""


@dataclass(frozen=True)
class Settings:
    """The fields of the Create tab, in its order."""

    prompt: str
    style: str
    pipeline: str
    count: int
    size: str
    steps: int
    guidance: float
    identity_scale: float
    structure_scale: float
    negative: str
    scheduler: str
    random_seed: bool
    seed: int | None
    pose: str | None


def look(session: Session, photos: Sequence[Any] | None, extractor: FaceExtractor, limits: Limits) -> list[Sitting]:
    """The photos with their faces; those seen before keep the face that was picked.

    photos: what a Gradio gallery gives: paths, or (path, caption). Raises BadRequest for too many, BadImage for one
    that is no photo or too large.
    """
    paths = [photo if isinstance(photo, str) else photo[0] for photo in photos or []]
    limits.count(len(paths))
    known = {each.path: each for each in session.sittings}
    session.sittings = [known.get(path) or Sitting.open(path, extractor, limits) for path in paths]
    session.shown = min(session.shown, max(0, len(paths) - 1))
    return session.sittings


def person(sittings: Sequence[Sitting], offer: Offer) -> Any:
    """What a request takes as ``who``. Raises BadRequest without a photo, NoFaceFound without a face."""
    if not offer.wants_person:
        return None
    if not sittings:
        raise BadRequest(f"{offer.name} needs a photo: drop one under “The person”, or click an example.", "who")
    usable = [each for each in sittings if each.faces]
    if not usable:
        raise NoFaceFound(sittings[0].problem or "no face found; try another photo.")
    return usable[0].portrait() if len(usable) == 1 else [each.portrait() for each in usable]


def make_request(sittings: Sequence[Sitting], offer: Offer, engine: LimitedEngine, wanted: Settings) -> Request:
    """A validated request. May load the pipeline, whose base decides what a size preset means in pixels."""
    if not offer.ready:
        raise BadRequest(f"{offer.name} cannot run here: {offer.cure}", "pipeline")
    who = person(sittings, offer)
    style = styles().get(wanted.style) or next(iter(styles().values()))
    prompt, negative = style.apply(wanted.prompt, wanted.negative)
    fields: dict[str, Any] = {}
    side = engine.pipeline(offer.name).backbone.default_size if wanted.size != "Pipeline's own" else 0
    if size := pixels(wanted.size, side):
        fields = {"width": size[0], "height": size[1]}
    if wanted.pose is not None and "instantid" in offer.name:
        fields["pose"] = wanted.pose
    return Request.create(
        who=who,
        prompt=prompt,
        negative_prompt=negative,
        pipeline=offer.name,
        n=int(wanted.count),
        steps=int(wanted.steps),
        guidance=wanted.guidance,
        identity_scale=wanted.identity_scale,
        structure_scale=wanted.structure_scale,
        scheduler=None if wanted.scheduler == "default" else wanted.scheduler,
        seed=roll() if wanted.random_seed or wanted.seed is None else int(wanted.seed),
        **fields,
    )


def variation(shot: Shot, count: int) -> Request:
    """More like a portrait: it is painted over with new seeds, the person and the words being the same."""
    image = shot.portrait.image
    return shot.request.change(
        image=image, strength=VARIATION, width=image.width, height=image.height, seed=roll(), n=int(count)
    )


def roll() -> int:
    """A new seed."""
    return secrets.randbelow(SEEDS)
