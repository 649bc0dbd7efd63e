"""How the time grows with the picture's size, the number of steps and the number of people, for stock and idgen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from idgen.bench.models import Size
from idgen.bench.timing import paired
from idgen.bench.workloads import Workload
from idgen.speed import Levers

PEOPLE = (2, 4)


def latents_of(size: Size) -> tuple[int, ...]:
    """Latent sides to measure at: 512, 768, 1024 and 1280 pixels for a full-size SDXL, half to double for others."""
    return (64, 96, 128, 160) if size.latent >= 128 else (size.latent // 2, size.latent, size.latent * 2)


def rows(
    make: Callable[..., Workload], kind: str, size: Size, device: str, steps: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """One row for each point, each with the ratio to the baseline in the same rounds.

    Args:
        make: ``make(kind, people=..., like=...)`` gives a workload of ``size`` with no lever applied.
        steps: of a whole picture; sizes and people are measured with a fifth of them.
    """
    workload = make(kind)
    baseline = workload.baseline()
    workload.prepare(Levers())
    few = max(2, steps // 5)
    measure = partial(_row, device=device, rounds=rounds)
    for count in sorted({1, max(1, steps // 3), max(1, 2 * steps // 3), steps}):
        yield measure(workload, baseline, "steps", count, count)
    for latent in latents_of(size):
        workload.resize(latent)
        baseline.inputs = workload.inputs
        yield measure(workload, baseline, "pixels", 8 * latent, few)
    if kind == "ip-adapter":
        untouched = make(kind)
        crowds = [make("regions", people=people, like=untouched) for people in PEOPLE]
        baselines = [crowd.baseline() for crowd in crowds]
        untouched.prepare(Levers())
        for people, crowd, plain in zip(PEOPLE, crowds, baselines):
            yield measure(crowd, plain, "people", people, few)


def _row(
    workload: Workload, baseline: Any, axis: str, value: int, steps: int, device: str, rounds: int
) -> dict[str, Any]:
    result = paired(partial(baseline, steps), {"exact": partial(workload.ours, steps)}, rounds=rounds, device=device)
    ours, theirs = result.times["exact"].median, result.times["baseline"].median
    return {
        "kind": workload.kind,
        "variant": f"{value} {axis}",
        "axis": axis,
        "value": value,
        "s": ours / 1000,
        "baseline_s": theirs / 1000,
        "ms_a_step": ours / steps,
        "ratio": result.ratios["exact"].as_dict(),
    }
