"""`idgen identity`: make, look at and mix identity files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from idgen.errors import BadRequest

if TYPE_CHECKING:
    from idgen.faces import Pick
    from idgen.identity import Identity

identity = typer.Typer(help="Make, look at and mix identities: what is known of one person.", no_args_is_help=True)

_JSON = typer.Option("--json", help="Print JSON.")
_OUT = typer.Option(help="Identity file to write, ending in .safetensors.")


@identity.command()
def create(
    photos: Annotated[list[Path], typer.Argument(help="One or several photos of the same person.", show_default=False)],
    out: Annotated[Path, _OUT],
    name: Annotated[str | None, typer.Option(help="Name of the person.")] = None,
    pick: Annotated[
        str, typer.Option(help="Face to take in each photo: largest, an index from 0, or x,y.")
    ] = "largest",
    pack: Annotated[Path | None, typer.Option(help="Face model pack, a folder of .onnx files.")] = None,
    recogniser: Annotated[Path | None, typer.Option(help="ArcFace .onnx file to recognise with.")] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Make an identity file from photos. A photo that shows someone else is named and left out."""
    from idgen.cli.faces import extractor_from
    from idgen.identity import Identity

    _check_target(out)
    wanted = _pick(pick)
    extractor = extractor_from(pack, recogniser)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        made = Identity.from_photos(photos, extractor, pick=wanted, name=name)
    for warning in caught:
        typer.echo(f"idgen: {warning.message}", err=True)
    _save(made, out, as_json)


@identity.command()
def show(
    file: Annotated[Path, typer.Argument(help="Identity file.", show_default=False)],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Show what an identity file holds."""
    from idgen.identity import Identity

    _print(Identity.load(file), file, as_json)


@identity.command()
def mix(
    first: Annotated[Path, typer.Argument(help="Identity file.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Identity file.", show_default=False)],
    out: Annotated[Path, _OUT],
    t: Annotated[float, typer.Option("--t", help="0 is the first person, 1 the second.")] = 0.5,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Mix two people into one identity file."""
    from idgen.identity import Identity

    _check_target(out)
    _save(Identity.load(first).mix(Identity.load(second), t), out, as_json)


def _pick(text: str) -> Pick:
    try:
        if text == "largest":
            return "largest"
        if "," in text:
            x, y = text.split(",")
            return float(x), float(y)
        return int(text)
    except ValueError as error:
        raise BadRequest(f"--pick {text}: it is largest, an index from 0, or x,y in pixels.", "pick") from error


def _check_target(out: Path) -> None:
    """Under another suffix `idgen generate` would take the file for a photo, and one that is a photo would be lost."""
    if out.suffix != ".safetensors":
        raise BadRequest(f"--out {out}: the name must end in .safetensors.", "out")


def _save(made: Identity, out: Path, as_json: bool) -> None:
    made.save(out)
    _print(made, out, as_json)


def _print(shown: Identity, file: Path, as_json: bool) -> None:
    report = _report(shown, file)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    typer.echo(f"{file}: {shown.name or 'without a name'}")
    for key, made in report["embeddings"].items():
        typer.echo(f"  embedding by {key}: {made['shape']}, length {', '.join(f'{n:.2f}' for n in made['norms'])}")
    if report["keypoints"]:
        size = report["keypoints_size"]
        typer.echo(f"  keypoints{f' in a photo of {size[0]} x {size[1]}' if size else ''}")
    if report["crop"]:
        typer.echo(f"  aligned crop of {report['crop'][0]} x {report['crop'][1]}")


def _report(shown: Identity, file: Path) -> dict[str, Any]:
    crop = shown.crop
    return {
        "file": str(file),
        "name": shown.name,
        "embeddings": {
            key: {
                "shape": list(value.shape),
                "norms": [float((row.astype(float) ** 2).sum() ** 0.5) for row in value.reshape(-1, value.shape[-1])],
            }
            for key, value in shown.embeddings.items()
        },
        "keypoints": None if shown.keypoints is None else shown.keypoints.tolist(),
        "keypoints_size": None if shown.keypoints_size is None else list(shown.keypoints_size),
        "crop": None if crop is None else list(crop.size),
    }
