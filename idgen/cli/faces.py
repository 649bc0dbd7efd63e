"""`idgen faces`: show which faces are found in photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from idgen.cli import complain
from idgen.errors import BadRequest

if TYPE_CHECKING:
    from idgen.faces import Face, FaceExtractor


def faces(
    photos: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    draw: Annotated[
        Path | None, typer.Option(help="Save the photo with its faces marked here; for several photos a folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    pack: Annotated[Path | None, typer.Option(help="Face model pack, a folder of .onnx files.")] = None,
    recogniser: Annotated[Path | None, typer.Option(help="ArcFace .onnx file to recognise with.")] = None,
) -> None:
    """Find faces in photos: box, keypoints, score and embedding length, largest first.

    Exit code 2 when a photo cannot be read or shows no face; the others are still reported.
    """
    extractor = extractor_from(pack, recogniser)
    targets = _targets(photos, draw)
    reports, failed = [], False
    for photo, target, found in zip(photos, targets, extractor.extract_many(photos)):
        if not isinstance(found, list):
            failed = True
            reports.append({"photo": str(photo), "faces": [], "error": str(found)})
            complain(found)
            continue
        report = _report(photo, found, extractor)
        reports.append(report)
        if not as_json:
            _print(report)
        if target is not None:
            _draw(found, target)
            typer.echo(f"drawn to {target}", err=True)
    if as_json:
        typer.echo(json.dumps(reports, indent=2))
    if failed:
        raise typer.Exit(2)


def extractor_from(pack: Path | None, recogniser: Path | None) -> FaceExtractor:
    """Return the extractor that the options name, or the default one without any."""
    if pack is not None:
        from idgen.faces import FaceExtractor

        return FaceExtractor(pack, recogniser)
    from idgen.api import default_extractor

    default = default_extractor()
    if recogniser is None:
        return default
    from idgen.faces import FaceExtractor

    return FaceExtractor(default.pack, recogniser)


def _targets(photos: list[Path], draw: Path | None) -> list[Path | None]:
    """Return where each photo's drawing goes."""
    if draw is None:
        return [None] * len(photos)
    if len(photos) == 1 and not draw.is_dir():
        return [draw]
    if draw.is_file() or (draw.suffix and not draw.is_dir()):
        raise BadRequest(f"--draw {draw}: {len(photos)} photos need a folder, not one file.", field="draw")
    names = [f"{photo.stem}-faces.png" for photo in photos]
    if len(set(names)) < len(names):  # photos of the same name from different folders
        names = [f"{index:03d}-{name}" for index, name in enumerate(names)]
    return [draw / name for name in names]


def _report(photo: Path, found: list[Face], extractor: FaceExtractor) -> dict[str, Any]:
    width, height = found[0].photo.size
    return {
        "photo": str(photo),
        "width": width,
        "height": height,
        "recogniser": extractor.recogniser_name,
        "providers": extractor.providers,
        "faces": [
            {
                "index": index,
                "box": [round(float(value), 2) for value in face.box],
                "keypoints": [[round(float(x), 2), round(float(y), 2)] for x, y in face.keypoints],
                "score": round(face.score, 4),
                "embedding_norm": round(float((face.embedding.astype(float) ** 2).sum() ** 0.5), 3),
            }
            for index, face in enumerate(found)
        ],
    }


def _print(report: dict[str, Any]) -> None:
    typer.echo(f"{report['photo']} ({report['width']} x {report['height']}): {len(report['faces'])} face(s)")
    for face in report["faces"]:
        left, top, right, bottom = face["box"]
        typer.echo(
            f"  {face['index']}: score {face['score']:.2f}, {right - left:.0f} x {bottom - top:.0f} pixels at "
            f"({left:.0f}, {top:.0f}), embedding length {face['embedding_norm']:.2f}"
        )


def _draw(found: list[Face], target: Path) -> None:
    from idgen.keypoints import draw_faces

    picture = draw_faces(found[0].photo, found)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
    except (OSError, ValueError) as error:  # ValueError: Pillow does not know the suffix
        raise BadRequest(f"--draw {target} cannot be written ({error}). Try a name ending in .png.", "draw") from error
