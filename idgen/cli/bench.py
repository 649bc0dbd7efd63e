"""``idgen bench``: measure speed, with random weights against stock diffusers or on mini; nothing is downloaded."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class SuiteName(str, Enum):
    """What can be measured."""

    cpu = "cpu"
    mini = "mini"
    h100 = "h100"


def bench(
    suite: Annotated[
        SuiteName,
        typer.Option(help="cpu: small random models, one thread. mini: the bundled models. h100: full size, on a GPU."),
    ] = SuiteName.cpu,
    size: Annotated[
        str | None, typer.Option(help="cpu, h100: one model size: nano, overhead, small, sdxl.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; 30, for mini 20.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved repetitions.")] = 5,
    people: Annotated[int, typer.Option(min=1, max=100, help="mini: people whose likeness is measured.")] = 12,
    seconds: Annotated[float, typer.Option(min=1, help="h100: stop before this many seconds have passed.")] = 500,
    resume: Annotated[bool, typer.Option(help="h100: go on from the results in --out.")] = False,
    device: Annotated[str, typer.Option(help="h100: where to run.")] = "cuda",
    compiled: Annotated[bool, typer.Option(help="h100: also with torch.compile.")] = True,
    approximate: Annotated[bool, typer.Option(help="cpu: also the approximate levers.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder for speed-SUITE.json, .md and .png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Compare idgen's sampler with stock diffusers pipelines, interleaved in one process.

    The cpu suite takes about 20 minutes, with --size overhead about 7; the mini suite about 6. The h100 suite stops
    after at most 9 minutes; run it again with --resume for the parts that it did not reach.
    """
    from idgen.backbone import choose_device
    from idgen.bench import cpu, gpu, mini, report
    from idgen.bench.models import SIZES
    from idgen.errors import BadRequest

    _quiet()
    if size is not None and size not in SIZES:
        raise BadRequest(f"there is no model size {size!r}; choose one of {', '.join(SIZES)}.", "size")
    if resume and (out is None or suite is not SuiteName.h100):
        raise BadRequest("--resume goes with --suite h100 and --out, where the earlier results lie.", "resume")
    say = lambda text: typer.echo(text, err=True)  # noqa: E731
    results: dict[str, Any]
    if suite is SuiteName.cpu:
        sizes = (size,) if size else ("overhead", "small")
        results = cpu.suite(sizes, steps=steps or 30, rounds=rounds, approximate=approximate, say=say)
    elif suite is SuiteName.mini:
        results = mini.suite(steps=steps or 20, rounds=rounds, people=people, say=say)
    else:
        choose_device(device)
        results = gpu.suite(
            size=size or "sdxl",
            device=device,
            dtype="bfloat16" if device.startswith("cuda") else "float32",
            steps=steps or 30,
            rounds=rounds,
            seconds=seconds,
            compiled=compiled,
            say=say,
            keep=(lambda results: None) if out is None else (lambda results: report.save_text(results, out)),
            before=report.load(out, "h100") if resume and out is not None else None,
        )
    if out is not None:
        for path in report.save(results, out):
            say(f"wrote {path}")
    typer.echo(json.dumps(results, indent=1) if as_json else report.markdown(results))


def _quiet() -> None:
    """diffusers notes at every build that it was given no image encoder, which is on purpose here."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
