"""`idgen batch`: render a prompt file into a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from idgen.batch import Problem, Summary


def batch(
    file: Annotated[
        str, typer.Argument(help="Prompt file: .txt, .csv, .jsonl or .yaml; a path or a URL.", show_default=False)
    ],
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder for the results, or a bucket's URL.")] = None,
    photo: Annotated[
        list[str] | None, typer.Option(help="Photo or identity for rows without one; repeat for several people.")
    ] = None,
    pipeline: Annotated[
        list[str] | None, typer.Option(help="For rows without one; repeat to render with each.")
    ] = None,
    seed: Annotated[list[str] | None, typer.Option(help="For rows without one; repeat, or write 0..9.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="For rows without one.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="Images of each row.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 8.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; up to 1 is off.")] = None,
    identity_scale: Annotated[float | None, typer.Option(help="Weight of the identity, 0 to 3.")] = None,
    structure_scale: Annotated[float | None, typer.Option(help="Weight of the face structure, 0 to 3.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="euler, dpm++-2m-karras, ddim, unipc, lcm ...")] = None,
    name: Annotated[
        str | None, typer.Option(help="Template of file names; {row} {line} {person} {pipeline} {seed} {image} {id}.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in one UNet call at most; 8 by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every line and photo; render nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad row instead of skipping it.")] = False,
    ray: Annotated[str | None, typer.Option(help="Render on a Ray cluster: auto, or its address.")] = None,
    workers: Annotated[int | None, typer.Option(help="Ray workers; by default one a GPU, or one a CPU.")] = None,
    base: Annotated[str | None, typer.Option(help="sdxl, sd15, mini, a folder, a hub id, a .safetensors file.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter file, in place of the store's.")] = None,
    controlnet: Annotated[Path | None, typer.Option(help="ControlNet folder, in place of the store's.")] = None,
    image_encoder: Annotated[Path | None, typer.Option(help="Image encoder folder.")] = None,
    faces: Annotated[Path | None, typer.Option(help="Face pack folder.")] = None,
    recogniser: Annotated[Path | None, typer.Option(help="Recogniser .onnx file.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16")] = "auto",
    attention: Annotated[str, typer.Option(help="auto, sdpa, flash, cudnn, efficient, xformers")] = "auto",
    speed: Annotated[
        str | None, typer.Option(help="exact (the default), fast or turbo; see docs/performance.md.")
    ] = None,
    few_step: Annotated[str | None, typer.Option(help="A few-step LoRA: lcm, lightning-4, hyper-sd-8 or dmd2.")] = None,
    offload: Annotated[str | None, typer.Option(help="For small GPUs: model or sequential.")] = None,
    vae_tiling: Annotated[bool, typer.Option(help="Decode tile by tile.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Render a prompt file into a folder. The same command again renders only what is missing or has changed.

    idgen batch prompts.yaml --out night

    Exit code 0 when every row is rendered, 2 when rows are bad (the others are rendered), 130 when stopped.
    """
    from idgen.batch import render_batch
    from idgen.batch.names import TEMPLATE
    from idgen.errors import BadRequest
    from idgen.speed import Levers, choose_levers, preset

    levers = choose_levers(preset(speed or "exact"), few_step)
    if out is None and not dry_run:
        raise BadRequest("say where the results go: --out FOLDER (or --dry-run to check the file only).", "out")
    fields = {
        "negative_prompt": negative_prompt,
        "n": n,
        "size": size,
        "steps": steps,
        "guidance": guidance,
        "identity_scale": identity_scale,
        "structure_scale": structure_scale,
        "scheduler": scheduler,
    }
    settings: dict[str, Any] = {
        "base": base,
        "adapter": adapter,
        "controlnet": controlnet,
        "image_encoder": image_encoder,
        "faces": faces,
        "recogniser": recogniser,
        "device": device,
        "dtype": dtype,
        "attention": attention,
        "offload": offload,
        "vae_tiling": vae_tiling,
        # The default is left out: it would be part of what tells finished pictures from others.
        "speed": levers if levers != Levers() else None,
    }
    summary = render_batch(
        file,
        out or ".",
        defaults={key: value for key, value in fields.items() if value is not None},
        matrix=_axes(photo, pipeline, seed),
        name=name or TEMPLATE,
        batch_size=batch_size,
        strict=strict,
        dry_run=dry_run,
        ray=ray,
        workers=workers,
        on_problem=_teller(file),
        **{key: value for key, value in settings.items() if value is not None},
    )
    _report(summary, dry_run, as_json)
    if summary.failed:
        raise typer.Exit(2)


def _axes(photo: list[str] | None, pipeline: list[str] | None, seed: list[str] | None) -> dict[str, Any]:
    """Options given several times are axes of a matrix. Their photos are relative to where the command runs."""
    photos = [each if "://" in each else str(Path(each).absolute()) for each in photo or []]
    seeds: Any = seed
    if seed is not None and len(seed) == 1:
        seeds = seed[0]  # one number, or a range
    axes = {"people": photos, "pipelines": pipeline, "seeds": seeds}
    return {name: values for name, values in axes.items() if values}


def _teller(file: str) -> Callable[[Problem], None]:
    """Prints each problem as FILE:LINE: MESSAGE, once however many rows a matrix makes of that line."""
    told: list[tuple[int, str]] = [(0, "")]

    def tell(problem: Problem) -> None:
        if told[0] != (problem.line, problem.message):
            told[0] = problem.line, problem.message
            typer.echo(f"{file}:{problem.line}: {problem.message}", err=True)

    return tell


def _report(summary: Summary, dry_run: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(summary.as_dict(), indent=2))
        return
    if dry_run:
        good = "all good" if not summary.failed else f"{summary.failed} bad"
        typer.echo(f"{summary.rows} rows, {summary.images} images to render, {good}.")
        return
    rate = f" at {summary.images_per_second:.2f} images/s" if summary.rendered else ""
    typer.echo(
        f"{summary.images} images: {summary.rendered} rendered in {summary.seconds:.1f} s{rate}, "
        f"{summary.kept} were there already; {summary.failed} failed."
    )
    for pipeline, found in summary.likeness.items():
        if found["measured"]:
            typer.echo(
                f"  {pipeline}: likeness {found['mean']:.3f} on average, {found['min']:.3f} at least "
                f"({found['measured']:.0f} of {found['images']:.0f} images measured)"
            )
    if summary.failed:
        typer.echo("  what failed, and why: results.jsonl and index.html")
    typer.echo(f"{summary.out}/index.html")
