"""`idgen pipelines`: what is registered, and whether its weights are here."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def pipelines(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the pipelines, the bases each can run on here, and what is missing for the others."""
    from idgen.registry import pipelines as known

    infos = known()
    if as_json:
        typer.echo(json.dumps([info.as_dict() for info in infos], indent=2))
        return
    for info in infos:
        here = f"runs on {', '.join(info.available)}" if info.available else "cannot run yet"
        typer.echo(f"{info.name}: {info.description}\n    {here}")
        for base, entries in info.missing.items():
            if base.startswith("mini"):
                continue  # not to be downloaded: it comes with the package or not at all
            note = {False: " (non-commercial)", "unclear": " (licence unclear)"}.get(info.commercial[base], "")
            flag = "" if info.commercial[base] is True else " --accept-licence"
            typer.echo(f"    {base}{note} lacks {', '.join(entries)}: idgen weights pull {' '.join(entries)}{flag}")
