"""The GPU suite: full-size models with random weights on the device; one command, within nine minutes on an H100.

Rows come in order of weight, and the suite stops before its time is up: what was not reached is listed by name. With
``size="nano"`` and ``device="cpu"`` the same code runs anywhere in seconds, which a test does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from idgen.bench import gpu_parts as parts
from idgen.bench.machine import describe
from idgen.bench.timing import Clock, paired, relative_error
from idgen.bench.workloads import Workload
from idgen.speed import Levers

Runs = dict[str, Callable[[], Any]]

TARGETS = {
    ("ip-adapter", "exact"): "ratio >= 1.7 and <= 1.05 s (stretch 0.90 s)",
    ("instantid", "exact"): "ratio >= 1.8 and <= 1.5 s (stretch 1.25 s)",
    ("ip-adapter", "batch 8"): ">= 1.2 images/s (stretch 1.35)",
    ("ip-adapter", "fp8 and turbo"): "<= 0.45 s",
    ("instantid", "fp8 and turbo"): "<= 0.60 s",
}


class Suite:
    """Collects rows until the time is up."""

    def __init__(
        self,
        size: str = "sdxl",
        device: str = "cuda",
        dtype: str = "bfloat16",
        steps: int = 30,
        rounds: int = 5,
        seconds: float = 500.0,
        compiled: bool = True,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.size, self.device, self.dtype = parts.SIZES[size], device, dtype
        self.steps, self.rounds, self.compiled, self.say = steps, rounds, compiled, say
        self.end = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []

    def run(self) -> dict[str, Any]:
        """All parts, the targets' first."""
        machine = describe()
        for kind in ("ip-adapter", "instantid"):
            self.part(f"{kind}: eager", 60, partial(self.eager, kind))
        self.part("throughput", 60, self.throughput)
        self.part("stages, operations, memory", 30, lambda: parts.stages(self))
        for kind in ("ip-adapter", "instantid"):
            if self.compiled:
                self.part(f"{kind}: compile regional", 60, partial(self.variants, kind, "regional"))
            self.part(f"{kind}: fp8", 60, partial(self.fp8, kind))
        self.part("growth with identities", 30, lambda: parts.growth(self))
        if self.compiled:
            self.part("recompilations", 40, lambda: parts.recompilations(self))
            for kind in ("ip-adapter", "instantid"):
                self.part(f"{kind}: compile full", 120, partial(self.variants, kind, "full"))
            self.part("baseline compiled", 150, lambda: parts.compiled_baseline(self))
        self.part("sd15", 40, lambda: parts.sd15(self))
        return {
            "suite": "h100",
            "size": self.size.name,
            "machine": machine,
            "clock": Clock(self.device).unit,
            "steps": self.steps,
            "rows": self.rows,
            "not_reached": self.skipped,
        }

    def part(self, name: str, needs: float, work: Callable[[], None]) -> None:
        """Do a part if about ``needs`` seconds are left; what fails is a row too, and the next part still runs."""
        if self.end - time.monotonic() < needs:
            self.skipped.append(name)
            return
        self.say(name)
        begin = time.monotonic()
        try:
            work()
        except Exception as error:  # a bench on a lent machine must hand back what it has
            self.rows.append({"part": name, "error": f"{type(error).__name__}: {str(error)[:300]}"})
        self.say(f"  {time.monotonic() - begin:.0f} s")
        parts.free(self.device)

    def make(self, kind: str, levers: Levers | None = None, **more: Any) -> Workload:
        """A workload of this suite's size, with load-time levers applied."""
        workload = Workload.make(kind, self.size, self.device, self.dtype, **more)
        workload.prepare(levers or Levers())
        return workload

    def eager(self, kind: str) -> None:
        """The stock loop against the exact path and the approximate levers, all without compilation."""
        workload = self.make(kind)
        baseline = workload.baseline()
        levers = {"exact": Levers(), **parts.APPROXIMATE}
        if kind != "instantid":
            levers = {name: value for name, value in levers.items() if "IdentityNet" not in name}
        runs: Runs = {n: partial(workload.ours, self.steps, levers=v) for n, v in levers.items()}
        runs["8 steps without guidance"] = lambda: workload.ours(8, guidance=1.0)
        self.compare(kind, lambda: baseline(self.steps), runs, reference=lambda: workload.ours(self.steps))

    def variants(self, kind: str, how: str) -> None:
        """A way of compiling, exact and with the approximate levers that go with it."""
        workload = self.make(kind, Levers(compile=how))
        levers = {f"exact, compile={how}": Levers(compile=how)}
        if how == "regional":
            levers["turbo, compile=regional"] = parts.APPROXIMATE["turbo"].change(compile=how)
        else:
            half = Levers(compile=how, guidance_until=0.5, structure_until=0.7)
            levers["half guidance, compile=full"] = half
        plain = self.make(kind)
        baseline = plain.baseline()
        begin = time.monotonic()
        workload.ours(2, levers=next(iter(levers.values())))
        self.rows.append({"kind": kind, "variant": f"first picture, {how}", "s": time.monotonic() - begin})
        runs: Runs = {n: partial(workload.ours, self.steps, levers=v) for n, v in levers.items()}
        if how == "full":
            runs["8 steps without guidance, compile=full"] = lambda: workload.ours(
                8, guidance=1.0, levers=Levers(compile=how)
            )
        self.compare(kind, lambda: baseline(self.steps), runs, reference=lambda: plain.ours(self.steps))

    def fp8(self, kind: str) -> None:
        """8-bit linear layers; without a compiler they gain little, so both are measured."""
        how = "regional" if self.compiled else None
        load = Levers(quantise="fp8" if self.device.startswith("cuda") else "int8", compile=how)
        workload, plain = self.make(kind, load), self.make(kind)
        baseline = plain.baseline()
        levers = {f"{load.quantise}": load}
        levers[f"{load.quantise} and turbo"] = parts.APPROXIMATE["turbo"].at_load_of(load)
        runs: Runs = {n: partial(workload.ours, self.steps, levers=v) for n, v in levers.items()}
        self.compare(kind, lambda: baseline(self.steps), runs, reference=lambda: plain.ours(self.steps))

    def throughput(self) -> None:
        """Images a second of the exact path at batch 1, 2, 4, 8."""
        base = self.make("ip-adapter")
        for batch in (1, 2, 4, 8):
            workload = Workload.make("ip-adapter", self.size, self.device, self.dtype, batch=batch, like=base)
            workload.ours(2)
            clock = Clock(self.device)
            run = partial(workload.ours, self.steps)
            times = [clock.measure(run) for _ in range(max(2, self.rounds // 2))]
            best = min(times)
            row: dict[str, Any] = {"kind": "ip-adapter", "variant": f"batch {batch}", "s": best / 1000}
            row |= {"images_s": 1000 * batch / best, "target": TARGETS.get(("ip-adapter", f"batch {batch}"))}
            self.rows.append(row | parts.peak_memory(self.device))

    def compare(self, kind: str, baseline: Callable[[], Any], runs: Runs, reference: Callable[[], Any]) -> None:
        """Interleaved, with errors against the exact eager path."""
        result = paired(baseline, runs, rounds=self.rounds, device=self.device)
        expected = reference()
        distance = relative_error(expected, baseline())
        self.rows.append(
            {
                "kind": kind,
                "variant": "baseline",
                "s": result.times["baseline"].median / 1000,
                "max_error_in_std": distance[0],
                "relative_l2_error": distance[1],
            }
        )
        for name, run in runs.items():
            # Another number of steps is another picture: its distance says nothing.
            error = (None, None) if name.startswith("8 steps") else relative_error(run(), expected)
            time_ = result.times[name]
            self.rows.append(
                {
                    "kind": kind,
                    "variant": name,
                    "s": time_.median / 1000,
                    "p95_s": time_.p95 / 1000,
                    "ms_a_step": time_.median / self.steps,
                    "ratio": result.ratios[name].as_dict(),
                    "max_error_in_std": error[0],
                    "relative_l2_error": error[1],
                    "target": TARGETS.get((kind, name)),
                    **parts.peak_memory(self.device),
                }
            )


def suite(**settings: Any) -> dict[str, Any]:
    """See :class:`Suite`."""
    with torch.no_grad():
        return Suite(**settings).run()
