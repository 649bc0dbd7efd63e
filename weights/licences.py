"""Which licences the user has agreed to, and which the user has ruled out."""

from __future__ import annotations

import os
from collections.abc import Iterable

from idgen.errors import LicenceRefused
from idgen.weights.manifest import Entry, with_needs


def commercial_only() -> bool:
    """Whether ``IDGEN_COMMERCIAL_ONLY`` is set. Any value but an empty one, 0, false, no or off counts as set."""
    return os.environ.get("IDGEN_COMMERCIAL_ONLY", "").strip().lower() not in ("", "0", "false", "no", "off")


def not_commercial(names: Iterable[str]) -> list[Entry]:
    """The entries among ``names``, and among what they need, that do not clearly allow commercial use."""
    return [entry for entry in with_needs(tuple(names)) if entry.commercial is not True]


def refuse_if_not_commercial(names: Iterable[str]) -> None:
    """Refuse weights that do not clearly allow commercial use, whatever ``commercial_only()`` says.

    Raises:
        LicenceRefused: one of ``names``, or something that they need, is non-commercial or unclear; all are named.
    """
    refused = not_commercial(names)
    if refused:
        raise LicenceRefused(
            f"commercial use only is asked for, but {_describe(refused)}. "
            "Choose other weights (idgen weights list), or unset IDGEN_COMMERCIAL_ONLY."
        )


def require_acceptance(entries: Iterable[Entry], accepted: bool) -> None:
    """Refuse to fetch weights with a restricted licence unless the user accepted it.

    Terms that are unclear count as restricted: somebody should read them before relying on the weights.

    Raises:
        LicenceRefused: not accepted; the message gives each licence and names the flag ``--accept-licence``.
    """
    restricted = [entry for entry in entries if entry.commercial is not True]
    if restricted and not accepted:
        raise LicenceRefused(
            f"{_describe(restricted)}. Read the terms at {', '.join(sorted({entry.source for entry in restricted}))}; "
            "if you accept them, run the command again with --accept-licence."
        )


def accept_flag(name: str) -> str:
    """What must follow ``idgen weights pull NAME``: the flag if it, or what it needs, is restricted, else nothing."""
    return " --accept-licence" if not_commercial([name]) else ""


def _describe(entries: list[Entry]) -> str:
    kinds = {False: "not for commercial use", "unclear": "of unclear terms"}
    return "; ".join(f"{entry.name} is {kinds[entry.commercial]} ({entry.licence})" for entry in entries)
