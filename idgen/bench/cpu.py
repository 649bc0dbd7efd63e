"""The CPU suite: what a processor can say about speed, within minutes and in one thread.

The overhead-bound model has SDXL's operations at almost no arithmetic: it predicts what a GPU waits for at batch 1. The
small one has arithmetic as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from idgen.bench import growth
from idgen.bench.face_rows import face_rows
from idgen.bench.machine import describe, has_fast_bfloat16
from idgen.bench.models import SIZES, Size
from idgen.bench.timing import Clock, Paired, paired, relative_error
from idgen.bench.workloads import KINDS, Workload
from idgen.speed import PRESETS, Levers

APPROXIMATE = {
    "guidance in 60 % of the steps": Levers(guidance_until=0.6),
    "guidance in 50 % of the steps": Levers(guidance_until=0.5),
    "IdentityNet in 60 % of the steps": Levers(structure_until=0.6),
    "IdentityNet on the conditional half": Levers(structure_half=True),
    "features kept for 2 steps": Levers(cache_every=2),
    "features kept for 3 steps": Levers(cache_every=3),
    "fast": PRESETS["fast"],
    "turbo": PRESETS["turbo"],
}

TARGETS = {
    ("overhead", "ip-adapter"): (1.25, 1.4),
    ("overhead", "instantid"): (1.4, 1.6),
    ("small", "ip-adapter"): (1.12, 1.25),
    ("small", "instantid"): (1.25, 1.4),
    ("overhead", "regions"): (1.3, 1.5),
    ("small", "regions"): (1.3, 1.5),
}
"""(size, kind) -> the exact path's least and wished-for ratio to the baseline."""


def suite(
    sizes: tuple[str, ...] = ("overhead", "small"),
    kinds: tuple[str, ...] = KINDS,
    steps: int = 30,
    rounds: int = 5,
    approximate: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure and return what :mod:`idgen.bench.report` shows and saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        machine = describe()
        for name in sizes:
            workload: Workload | None = None
            for kind in kinds:
                workload = Workload.make(kind, SIZES[name], like=workload)
                say(f"{name}, {kind}: exact")
                rows.append(exact(workload, steps, rounds))
                if approximate and kind != "regions":
                    say(f"{name}, {kind}: approximate")
                    rows += approximations(workload, steps, max(1, rounds // 2))
        few = min(3, rounds)
        for kind in (kind for kind in kinds if kind != "regions"):
            title = f"growth, {sizes[0]}, {kind}"
            say(title)
            make = partial(_make, SIZES[sizes[0]])
            rows += [{"part": title, **r} for r in growth.rows(make, kind, SIZES[sizes[0]], "cpu", steps, few)]
        say("faces")
        rows += [{"part": "faces, wall-clock time", **row} for row in face_rows(rounds=few)]
    finally:
        torch.set_num_threads(threads)
    return {"suite": "cpu", "machine": machine, "clock": Clock("cpu").unit, "steps": steps, "rows": rows}


def _make(size: Size, kind: str, **more: Any) -> Workload:
    return Workload.make(kind, size, **more)


def exact(workload: Workload, steps: int, rounds: int) -> dict[str, Any]:
    """idgen's default against the baseline, and how far apart their latents are."""
    baseline = workload.baseline()
    result = paired(lambda: baseline(steps), {"exact": lambda: workload.ours(steps)}, rounds=rounds)
    error = relative_error(workload.ours(steps), baseline(steps))
    target = TARGETS.get((workload.size.name, workload.kind))
    return _row(workload, "exact", result, error, steps) | {"target": target}


def approximations(workload: Workload, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Every approximate lever against the baseline; its error is that of its final latents against the exact ones."""
    baseline = workload.baseline()
    reference = workload.ours(steps)
    chosen = {n: v for n, v in APPROXIMATE.items() if workload.kind == "instantid" or "IdentityNet" not in n}
    runs: dict[str, Callable[[], Any]] = {
        name: partial(workload.ours, steps, levers=levers) for name, levers in chosen.items()
    }
    if has_fast_bfloat16():
        half = Workload.make(workload.kind, workload.size, dtype="bfloat16")
        for name, levers in (("bfloat16", Levers()), ("bfloat16 and fast", PRESETS["fast"])):
            runs[name] = partial(half.ours, steps, levers=levers)
        runs["bfloat16 and turbo"] = lambda: half.ours(steps, levers=PRESETS["turbo"])
    result = paired(lambda: baseline(steps), runs, rounds=rounds, warm=False)
    return [_row(workload, name, result, relative_error(run(), reference), steps) for name, run in runs.items()]


def _row(workload: Workload, name: str, result: Paired, error: tuple[float, float], steps: int) -> dict[str, Any]:
    variant = result.times[name]
    return {
        "size": workload.size.name,
        "kind": workload.kind,
        "variant": name,
        "ratio": result.ratios[name].as_dict(),
        "baseline_ms_a_step": round(result.times["baseline"].median / steps, 3),
        "ms_a_step": round(variant.median / steps, 3),
        "p95_ms_a_step": round(variant.p95 / steps, 3),
        "rounds": variant.count,
        "steps": steps,
        "max_error_in_std": error[0],
        "relative_l2_error": error[1],
    }
