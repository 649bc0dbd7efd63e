"""Compile for the CPU with inductor, compare with the plain path, and count compilations over a sweep.

    python benchmarks/compile_cpu.py

Takes some minutes and a C++ compiler; needs no weights. Writes ``results/compile-cpu.json``.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from idgen.bench.inputs import Inputs
from idgen.bench.machine import describe
from idgen.bench.models import SIZES
from idgen.bench.timing import relative_error
from idgen.bench.workloads import KINDS, Workload
from idgen.speed import Levers

STEPS = 4


def main() -> None:
    """Measure every kind with each way to compile."""
    rows = [measure(kind, how) for kind in KINDS for how in ("regional", "full")]
    out = {"machine": describe(), "model": "nano", "steps": STEPS, "backend": "inductor", "rows": rows}
    path = Path(__file__).parent / "results" / "compile-cpu.json"
    path.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


def measure(kind: str, how: str) -> dict[str, Any]:
    """One kind, compiled once; every picture of the sweep against the same picture without compilation or lean."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (Workload.make(kind, SIZES["nano"]) for _ in range(2))
    levers = Levers(compile=how)
    compiled.prepare(levers)
    errors: dict[str, float] = {}
    graphs: dict[str, int] = {}
    first = 0.0
    for name, inputs in sweep(plain).items():
        plain.inputs = compiled.inputs = inputs
        begun = time.perf_counter()
        made = compiled.ours(STEPS, levers=levers)
        first = first or time.perf_counter() - begun
        errors[name] = relative_error(made, plain.ours(STEPS, levers=Levers(lean=False)))[0]
        graphs[name] = counters["stats"]["unique_graphs"]
    row = {"kind": kind, "compile": how, "first_picture_s": round(first, 1), "largest_error_in_sd": errors}
    row |= {"graphs_after": graphs, "graph_breaks": sum(counters["graph_break"].values())}
    print(row, flush=True)
    return row


def sweep(workload: Workload) -> dict[str, Inputs]:
    """One change at a time."""
    first = workload.inputs
    people = first.images.shape[1]
    other = Inputs.random(workload.size, people=people, seed=1)
    return {
        "first": first,
        "scale": replace(first, scale=0.3, structure_scale=1.1),
        "identity": replace(first, images=other.images, tokens=other.tokens),
        "seed": replace(first, noise=other.noise),
        "prompt": replace(first, text=other.text, negative=other.negative, pooled=other.pooled),
        "control image": replace(first, control=other.control),
        "all": replace(other, scale=1.2, structure_scale=0.4),
    }


if __name__ == "__main__":
    main()
