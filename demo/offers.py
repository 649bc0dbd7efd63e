"""Which pipelines the demo can offer, and what the others lack."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from idgen.method import Defaults
    from idgen.registry import PipelineInfo

ORDER = ("instantid", "ip-adapter-faceid-plusv2", "ip-adapter-faceid", "arc2face")
"""Shown first: the ones that people come for."""


@dataclass(frozen=True)
class Offer:
    """One pipeline as the demo shows it."""

    name: str
    description: str
    ready: bool
    lacking: tuple[str, ...]
    """manifest entries to get before it can run; empty when it is ready, or is not offered here at all"""
    wants_person: bool
    takes_prompt: bool
    defaults: Defaults

    @property
    def cure(self) -> str:
        """The command that makes it ready, or what stands in its place."""
        if not self.lacking:
            return "it is not offered here"
        return f"idgen weights pull {' '.join(self.lacking)} --accept-licence"


def offers(base: str | None = None, ready: Collection[str] | None = None) -> list[Offer]:
    """All registered pipelines, the ready ones first.

    base: offer what runs on this base: a manifest name, ``mini``, or a base of the user's own. ``None``: on any.
    ready: names that are ready whatever the manifest says, because the engine was given their weights by path.
    """
    import idgen
    from idgen.registry import method

    made = []
    for info in idgen.pipelines():
        cls = method(info.name)
        can, lacking = _state(info, base)
        if ready is not None:
            can = info.name in ready
        made.append(
            Offer(
                info.name,
                info.description,
                can,
                () if can else lacking,
                wants_person=any(cls.weights.values()),
                takes_prompt=not cls.speaks_text,
                defaults=cls.defaults_on(_runs_on(info, base)),
            )
        )
    rank = {name: i for i, name in enumerate(ORDER)}
    return sorted(made, key=lambda offer: (not offer.ready, rank.get(offer.name, len(rank)), offer.name))


def _runs_on(info: PipelineInfo, base: str | None) -> str:
    """The base whose defaults the form shows: the one that would be loaded; a base of the user's own by its path."""
    if base is not None and base != "mini":
        return base
    fitting = [name for name in info.available or info.bases if base is None or name.startswith("mini-")]
    return fitting[0] if fitting else info.bases[0]


def _state(info: PipelineInfo, base: str | None) -> tuple[bool, tuple[str, ...]]:
    """Whether a pipeline can run on a base, and the fewest entries that it lacks otherwise."""
    from idgen.bases import BASES

    own = base is not None and base not in (*BASES, "mini")
    if base is None or own:
        bases = info.bases
    elif base == "mini":
        bases = tuple(name for name in info.bases if name.startswith("mini"))
    else:
        bases = tuple(name for name in info.bases if name == base)
    lacking = {name: tuple(e for e in info.missing.get(name, ()) if not (own and e == name)) for name in bases}
    if any(not entries for entries in lacking.values()):
        return True, ()
    # Mini comes with the package and cannot be pulled: name what can.
    pullable = {name: entries for name, entries in info.missing.items() if not name.startswith("mini")}
    return False, min(pullable.values(), key=len, default=())
