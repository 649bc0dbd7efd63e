"""``idgen weights``: which weights exist, getting them, checking them, carrying them to other machines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from idgen.cli import complain
from idgen.errors import IdgenError

app = typer.Typer(name="weights", help="List, download, check, convert and carry model weights.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Accept = Annotated[bool, typer.Option("--accept-licence", help="Accept restricted or unclear licences.")]
Name = Annotated[str, typer.Argument(help="A name from: idgen weights list.")]


def _fail(error: IdgenError) -> typer.Exit:
    """Print an error as one message; exit code 2 says that it is about the user's input or machine."""
    complain(error)
    return typer.Exit(2)


def _commercial(value: bool | str) -> str:
    return value if isinstance(value, str) else ("yes" if value else "no")


@app.command("list")
def list_(
    as_json: AsJson = False,
    present: Annotated[bool, typer.Option("--present", help="Only what is on this machine.")] = False,
) -> None:
    """Show every known set of weights, its licence, and whether it is on this machine."""
    from idgen.weights.manifest import load_manifest
    from idgen.weights.store import Store

    try:
        entries, here = load_manifest(), set(Store().present())
    except IdgenError as error:
        raise _fail(error) from None
    rows = [entry for entry in entries.values() if entry.name in here or not present]
    if as_json:
        typer.echo(json.dumps([{**asdict(e), "source": e.source, "present": e.name in here} for e in rows], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("name", "base", "size", "commercial", "here"):
        table.add_column(title, no_wrap=True, justify="right" if title == "size" else "left")
    table.add_column("licence", no_wrap=True, overflow="ellipsis")
    for e in rows:
        size = f"{e.size_approx / 1e6:,.0f} MB" if e.size_approx < 1e9 else f"{e.size_approx / 1e9:.2f} GB"
        table.add_row(e.name, e.base, size, _commercial(e.commercial), "yes" if e.name in here else "", e.licence)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a pipe has no width; do not cut what somebody may want to grep
    console.print(table)


@app.command()
def pull(
    names: Annotated[list[str], typer.Argument(help="Names from: idgen weights list.")],
    accept_licence: Accept = False,
    needs: Annotated[bool, typer.Option("--needs/--no-needs", help="Also pull what these weights need.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Download again, to repair damaged files.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Take what the source has now; record it anew.")] = False,
    as_json: AsJson = False,
) -> None:
    """Download weights and what they need. What is here already is left alone."""
    from idgen.weights.manifest import get_entry
    from idgen.weights.store import Store

    store, paths = Store(), {}
    try:
        for name in names:
            get_entry(name)  # a mistyped last name should not cost the download of the first
        for name in names:
            path = store.pull(name, accept_licence, progress=not as_json, needs=needs, force=force, update=update)
            paths[name] = str(path)
            if not as_json:
                typer.echo(f"{name}: {path}")
    except IdgenError as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps(paths, indent=2))


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="One name; default: everything that is here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the files on disk with the sha256 of their first download. Exit code 1 if any differs or is missing."""
    from idgen.weights.store import Store

    try:
        checks = Store().verify(name)
    except IdgenError as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps([{**asdict(check), "ok": check.ok} for check in checks], indent=2))
    else:
        for check in checks:
            typer.echo(f"{check.status:<10} {check.name}  {check.file}" + (f"  {check.cure}" if check.cure else ""))
        bad = sum(not check.ok for check in checks)
        typer.echo(f"{len(checks)} files checked, {bad} bad." if checks else "There are no weights on this machine.")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def path(name: Name, as_json: AsJson = False) -> None:
    """Print where weights are."""
    from idgen.weights.store import Store

    try:
        found = Store().path(name)
    except IdgenError as error:
        raise _fail(error) from None
    typer.echo(json.dumps({"name": name, "path": str(found)}) if as_json else str(found))


@app.command()
def bundle(
    names: Annotated[list[str], typer.Argument(help="Names from: idgen weights list.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder, or a new .zip file.")],
    needs: Annotated[bool, typer.Option("--needs/--no-needs", help="Also bundle what these weights need.")] = True,
    as_json: AsJson = False,
) -> None:
    """Copy weights to a folder or zip, to carry to a machine without network."""
    from idgen.weights.store import Store

    try:
        written = Store().bundle(names, out, needs=needs)
    except IdgenError as error:
        raise _fail(error) from None
    where: dict[str, Any] = {"bundle": str(written)}
    typer.echo(json.dumps(where) if as_json else f"{written}\nOn the other machine: idgen weights add {written.name}")


@app.command()
def add(
    source: Annotated[Path, typer.Argument(help="A bundle, or one entry's file, folder or zip.")],
    name: Annotated[str | None, typer.Option("--name", help="Which weights it is, if its name does not say.")] = None,
    accept_licence: Accept = False,
    as_json: AsJson = False,
) -> None:
    """Take weights from a bundle, or from files that were downloaded by other means."""
    from idgen.weights.store import Store

    store = Store()
    try:
        added = {key: str(store.path(key)) for key in store.add(source, name, accept_licence)}
    except IdgenError as error:
        raise _fail(error) from None
    typer.echo(json.dumps(added, indent=2) if as_json else "\n".join(f"{key}: {at}" for key, at in added.items()))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A .safetensors file, or a folder of a base, ControlNet or encoder.")],
    dest: Annotated[Path, typer.Argument(help="A new file or folder.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32: the format that is served.")] = "bfloat16",
) -> None:
    """Write a copy of weights in another number format, which then loads without conversion."""
    from idgen.weights.convert import convert as write

    try:
        typer.echo(str(write(source, dest, dtype)))
    except IdgenError as error:
        raise _fail(error) from None


@app.command()
def remove(name: Name) -> None:
    """Forget weights and delete idgen's own copy. Files in the Hugging Face cache stay."""
    from idgen.weights.store import Store

    store = Store()
    try:
        done = store.remove(name)
        left = store.locate(name)
    except IdgenError as error:
        raise _fail(error) from None
    typer.echo(f"{name}: {'removed' if done else 'there was nothing to remove'}.")
    if left is not None:
        typer.echo(f"A copy that idgen does not own stays at {left.root}.")
