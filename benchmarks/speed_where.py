"""Where the time of a step goes, for the baselines and for idgen, on a CPU in one thread.

    OMP_NUM_THREADS=1 python benchmarks/speed_where.py

Writes ``results/speed-where.json`` and ``.png``. Each operation is timed by process CPU time (torch's profiler counts
elapsed time, with a shared machine's other programs in it); the rest of an untimed run is Python and dispatch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from idgen.bench.models import SIZES
from idgen.bench.workloads import Workload

STEPS = 2
RESULTS = Path(__file__).parent / "results"
KINDS = {
    "linear layers": ("addmm", "aten::mm", "linear_pointwise", "bmm"),
    "convolutions": ("conv",),
    "attention": ("scaled_dot_product", "flash"),
    "normalisation": ("norm",),
}
COLOURS = ("#2a6f97", "#61a5c2", "#c98a3a", "#8a9a5b", "#bbbbbb", "#d9534f")


class Timed(TorchDispatchMode):
    """Adds up the CPU time of operations by kind, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = dict.fromkeys([*KINDS, "elementwise and copies"], 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.process_time()
        out = func(*args, **(kwargs or {}))
        spent = time.process_time() - begin
        name = func.name()
        kind = next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "elementwise and copies")
        # Views and shapes do no work of their own: they are dispatch.
        if not func.is_view:
            self.table[kind] += spent
        return out


def split(run: Callable[[], Any]) -> dict[str, float]:
    """ms a step by kind of work."""
    run()
    begin = time.process_time()
    run()
    total = time.process_time() - begin
    with Timed() as timed:
        run()
    table = timed.table | {"Python and dispatch": max(0.0, total - sum(timed.table.values()))}
    return {kind: seconds * 1000 / STEPS for kind, seconds in table.items()}


def main() -> None:
    """Measure and draw."""
    torch.set_num_threads(1)
    rows: dict[str, dict[str, float]] = {}
    for name in ("overhead", "small"):
        for kind in ("ip-adapter", "instantid"):
            workload = Workload.make(kind, SIZES[name])
            baseline = workload.baseline()
            rows[f"{name}, {kind}: baseline"] = split(lambda run=baseline: run(STEPS))  # type: ignore[misc]
            rows[f"{name}, {kind}: idgen"] = split(lambda w=workload: w.ours(STEPS))  # type: ignore[misc]
    RESULTS.joinpath("speed-where.json").write_text(
        json.dumps({k: {n: round(v, 2) for n, v in t.items()} for k, t in rows.items()}, indent=1) + "\n"
    )
    draw(rows, RESULTS / "speed-where.png")


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Stacked bars, each pair in parts of its baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    names = list(rows)
    for number, name in enumerate(names):
        whole = sum(rows[names[number - number % 2]].values())
        left = 0.0
        for (kind, value), colour in zip(rows[name].items(), COLOURS):
            axis.barh(number, value / whole, left=left, color=colour, label=kind if number == 0 else None, height=0.7)
            left += value / whole
        axis.text(left + 0.01, number, f"{sum(rows[name].values()):.0f} ms", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12)
    axis.set_xlabel("time of one guided step, in parts of the baseline's")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
