"""``idgen bench``: measure speed against stock diffusers, with random weights; nothing is downloaded."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class SuiteName(str, Enum):
    """What can be measured."""

    cpu = "cpu"
    h100 = "h100"


def bench(
    suite: Annotated[SuiteName, typer.Option(help="cpu: small models, one thread. h100: full size, on a GPU.")] = (
        SuiteName.cpu
    ),
    size: Annotated[str | None, typer.Option(help="One model size: nano, overhead, small, sdxl.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved repetitions.")] = 5,
    seconds: Annotated[float, typer.Option(min=1, help="h100: stop before this many seconds have passed.")] = 500,
    device: Annotated[str, typer.Option(help="h100: where to run.")] = "cuda",
    compiled: Annotated[bool, typer.Option(help="h100: also with torch.compile.")] = True,
    approximate: Annotated[bool, typer.Option(help="cpu: also the approximate levers.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder for speed-SUITE.json, .md and .png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Compare idgen's sampler with stock diffusers pipelines, interleaved in one process.

    The cpu suite takes about 15 minutes, with --size overhead about 5; the h100 suite at most 9 minutes.
    """
    from idgen.backbone import choose_device
    from idgen.bench import cpu, gpu, report
    from idgen.bench.models import SIZES
    from idgen.errors import BadRequest

    _quiet()
    if size is not None and size not in SIZES:
        raise BadRequest(f"there is no model size {size!r}; choose one of {', '.join(SIZES)}.", "size")
    say = lambda text: typer.echo(text, err=True)  # noqa: E731
    results: dict[str, Any]
    if suite is SuiteName.cpu:
        sizes = (size,) if size else ("overhead", "small")
        results = cpu.suite(sizes, steps=steps, rounds=rounds, approximate=approximate, say=say)
    else:
        choose_device(device)
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
        results = gpu.suite(
            size=size or "sdxl",
            device=device,
            dtype=dtype,
            steps=steps,
            rounds=rounds,
            seconds=seconds,
            compiled=compiled,
            say=say,
        )
    if out is not None:
        for path in report.save(results, out):
            say(f"wrote {path}")
    typer.echo(json.dumps(results, indent=1) if as_json else report.markdown(results))


def _quiet() -> None:
    """diffusers notes at every build that it was given no image encoder, which is on purpose here."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
