"""The GPU suite: full-size models with random weights on the device; each run of the command stops within nine minutes.

Parts come in order of weight. Every row is handed on as soon as it is measured, so that a run that is killed loses one
part only; what was not reached is listed by name, and a run that is given the earlier results goes on from there. With
``size="nano"`` and ``device="cpu"`` the same code runs anywhere in seconds, which a test does.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from idgen.bench import gpu_parts as parts
from idgen.bench import growth
from idgen.bench.face_rows import face_rows
from idgen.bench.machine import describe
from idgen.bench.timing import Clock, paired, relative_error
from idgen.bench.workloads import Workload
from idgen.errors import BadRequest
from idgen.speed import Levers

Runs = dict[str, Callable[[], Any]]

TARGETS = {
    ("ip-adapter", "exact"): "ratio >= 1.7 and <= 1.05 s (stretch 0.90 s)",
    ("instantid", "exact"): "ratio >= 1.8 and <= 1.5 s (stretch 1.25 s)",
    ("ip-adapter", "batch 8"): ">= 1.2 images/s (stretch 1.35)",
    ("ip-adapter", "fp8 and turbo"): "<= 0.45 s",
    ("instantid", "fp8 and turbo"): "<= 0.60 s",
    ("ip-adapter", "8 steps without guidance"): "<= 0.22 s",
    ("instantid", "8 steps without guidance"): "<= 0.30 s",
}
"""(kind, variant without the way of compiling) -> what was asked for; every way of compiling may reach it."""


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
        keep: Callable[[dict[str, Any]], None] = lambda _: None,
        before: dict[str, Any] | None = None,
    ) -> None:
        """keep: is given all results so far after every row. before: results of an earlier run, to go on from.

        Raises `BadRequest` when `before` was measured otherwise: another GPU, torch, size or number of steps.
        """
        self.size, self.device, self.dtype = parts.SIZES[size], device, dtype
        self.steps, self.rounds, self.compiled, self.say, self.keep = steps, rounds, compiled, say, keep
        self.end = time.monotonic() + seconds
        self.machine = describe()
        self.rows: list[dict[str, Any]] = []
        self.done: dict[str, float] = {}
        """part -> seconds that it took"""
        self.skipped: list[str] = []
        self._part = ""
        if before is not None:
            self._go_on(before)

    def _go_on(self, before: dict[str, Any]) -> None:
        mine, theirs = self.results(), before
        for name in ("suite", "size", "steps", "dtype"):
            if theirs.get(name) != mine[name]:
                raise BadRequest(f"the earlier results have {name} {theirs.get(name)!r}, not {mine[name]!r}.", "resume")
        for name in ("gpu", "torch"):
            if theirs["machine"].get(name) != self.machine.get(name):
                raise BadRequest(f"the earlier results were measured with another {name}.", "resume")
        self.done = dict(before["done"])
        self.rows = [row for row in before["rows"] if row["part"] in self.done]

    def results(self) -> dict[str, Any]:
        """What is known so far."""
        return {
            "suite": "h100",
            "size": self.size.name,
            "dtype": self.dtype,
            "machine": self.machine,
            "clock": Clock(self.device).unit,
            "steps": self.steps,
            "rows": self.rows,
            "done": self.done,
            "not_reached": self.skipped,
        }

    def run(self) -> dict[str, Any]:
        """All parts, the targets' first. The numbers are the seconds that each needs on an H100, at a guess."""
        kinds = ("ip-adapter", "instantid")
        for kind, needs in zip(kinds, (100, 140)):
            self.part(f"{kind}: exact", needs, partial(self.exact, kind))
        self.part("ip-adapter: throughput", 70, partial(self.throughput, "ip-adapter", (8, 1, 2, 4)))
        self.part("instantid: throughput", 50, partial(self.throughput, "instantid", (8,)))
        for kind, needs in zip(kinds, (80, 110)):
            self.part(f"{kind}: fp8", needs, partial(self.fp8, kind))
        self.part("stages, operations, memory", 40, partial(parts.stages, self))
        self.part("faces", 15, self.faces)
        if self.compiled:
            for kind, needs in zip(kinds, (150, 220)):
                self.part(f"{kind}: compile full", needs, partial(self.full, kind))
            for kind, needs in zip(kinds, (150, 220)):
                self.part(f"{kind}: baseline compiled", needs, partial(parts.compiled_baseline, self, kind))
        for kind, needs in zip(kinds, (60, 90)):
            self.part(f"{kind}: approximate", needs, partial(self.approximate, kind))
        for kind, needs in zip(kinds, (50, 70)):
            self.part(f"{kind}: growth", needs, partial(self.growth, kind))
        if self.compiled:
            self.part("recompilations", 40, partial(parts.recompilations, self))
        self.part("attention backends", 30, partial(parts.attention_backends, self))
        self.part("first picture and loading", 90, partial(parts.first_picture, self))
        self.part("sd15", 40, partial(parts.sd15, self))
        self.keep(self.results())
        return self.results()

    def part(self, name: str, needs: float, work: Callable[[], None]) -> None:
        """Do a part if about ``needs`` seconds are left; what fails is a row too, and the next part still runs."""
        if name in self.done:
            return
        if self.end - time.monotonic() < needs:
            self.skipped.append(name)
            return
        self.say(name)
        begin = time.monotonic()
        self._part = name
        try:
            work()
            self.done[name] = round(time.monotonic() - begin, 1)
        except Exception as error:  # a bench on a lent machine must hand back what it has
            self.add(error=f"{type(error).__name__}: {str(error)[:300]}")
        self.say(f"  {time.monotonic() - begin:.0f} s")
        self.keep(self.results())
        parts.free(self.device)

    def add(self, **row: Any) -> None:
        """One more row of the present part. A number that is not finite is left out: JSON has none."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.rows.append({"part": self._part, **finite})
        self.keep(self.results())

    def workload(self, kind: str, **more: Any) -> Workload:
        """Of this suite's size, with no lever applied: what a baseline is built on."""
        return Workload.make(kind, self.size, self.device, self.dtype, **more)

    def prepared(self, kind: str, levers: Levers | None = None) -> Workload:
        """With load-time levers applied."""
        workload = self.workload(kind)
        workload.prepare(levers or Levers())
        return workload

    def against(self, kind: str) -> tuple[Callable[[], Any], Workload]:
        """(the stock loop, idgen's default). The baseline is copied first: levers change the memory format."""
        workload = self.workload(kind)
        baseline = workload.baseline()
        workload.prepare(Levers())
        return partial(baseline, self.steps), workload

    def exact(self, kind: str) -> None:
        """The stock loop against the exact path as Python runs it, and with its blocks compiled."""
        baseline, plain = self.against(kind)
        runs: Runs = {"exact": partial(plain.ours, self.steps)}
        if self.compiled:
            levers = Levers(compile="regional")
            fast = self.prepared(kind, levers)
            self.first(kind, fast, levers)
            runs["exact, compile=regional"] = partial(fast.ours, self.steps, levers=levers)
            turbo = parts.APPROXIMATE["turbo"].at_load_of(levers)
            runs["turbo, compile=regional"] = partial(fast.ours, self.steps, levers=turbo)
        self.compare(kind, baseline, runs, runs["exact"])

    def full(self, kind: str) -> None:
        """The whole network compiled, with CUDA graphs; few steps without guidance, where overhead weighs most."""
        levers = Levers(compile="full")
        baseline, plain = self.against(kind)
        fast = self.prepared(kind, levers)
        self.first(kind, fast, levers)
        runs: Runs = {"exact, compile=full": partial(fast.ours, self.steps, levers=levers)}
        self.compare(kind, baseline, runs, partial(plain.ours, self.steps), rounds=3)
        runs = {"8 steps without guidance, compile=full": partial(fast.ours, 8, guidance=1.0, levers=levers)}
        self.compare(kind, baseline, runs, None, rounds=2)

    def approximate(self, kind: str) -> None:
        """The levers that act on steps, without compilation: the ratio of each to the exact path is the same."""
        baseline, plain = self.against(kind)
        chosen = {n: v for n, v in parts.APPROXIMATE.items() if kind == "instantid" or "IdentityNet" not in n}
        runs: Runs = {name: partial(plain.ours, self.steps, levers=levers) for name, levers in chosen.items()}
        self.compare(kind, baseline, runs, partial(plain.ours, self.steps), rounds=2)
        runs = {"8 steps without guidance": partial(plain.ours, 8, guidance=1.0)}
        self.compare(kind, baseline, runs, None, rounds=2)

    def fp8(self, kind: str) -> None:
        """8-bit linear layers; without a compiler they gain little."""
        if importlib.util.find_spec("torchao") is None:
            self.add(kind=kind, variant="fp8", skipped="torchao is not installed")
            return
        how = "regional" if self.compiled else None
        load = Levers(quantise="fp8" if self.device.startswith("cuda") else "int8", compile=how)
        baseline, plain = self.against(kind)
        fast = self.prepared(kind, load)
        levers = {f"{load.quantise}": load}
        levers[f"{load.quantise} and turbo"] = parts.APPROXIMATE["turbo"].at_load_of(load)
        runs: Runs = {n: partial(fast.ours, self.steps, levers=v) for n, v in levers.items()}
        runs |= {"8 steps without guidance, fp8": partial(fast.ours, 8, guidance=1.0, levers=load)}
        self.compare(kind, baseline, runs, partial(plain.ours, self.steps), rounds=3)

    def throughput(self, kind: str, batches: tuple[int, ...]) -> None:
        """Images a second of the exact path; the largest batch with compiled blocks too."""
        plain = self.prepared(kind)
        for batch in batches:
            self._throughput(plain, batch, f"batch {batch}", Levers())
        if self.compiled:
            del plain
            levers = Levers(compile="regional")
            self._throughput(self.prepared(kind, levers), batches[0], f"batch {batches[0]}, compile=regional", levers)

    def _throughput(self, like: Workload, batch: int, variant: str, levers: Levers) -> None:
        workload = self.workload(like.kind, batch=batch, like=like)
        workload.ours(2, levers=levers)
        clock = Clock(self.device)
        parts.reset_peak(self.device)
        best = min(clock.measure(partial(workload.ours, self.steps, levers=levers)) for _ in range(2))
        self.add(
            kind=like.kind,
            variant=variant,
            s=best / 1000,
            images_s=1000 * batch / best,
            target=_target(like.kind, variant),
            **parts.peak_memory(self.device),
        )

    def faces(self) -> None:
        """On every processor that the face models can run on."""
        devices = ("cpu", "cuda") if self.device.startswith("cuda") else ("cpu",)
        for row in face_rows(devices, rounds=min(3, self.rounds)):
            self.add(**row)

    def growth(self, kind: str) -> None:
        """With the picture's size, the number of steps and the number of people."""
        for row in growth.rows(self.workload, kind, self.size, self.device, self.steps, min(3, self.rounds)):
            self.add(**row)

    def first(self, kind: str, workload: Workload, levers: Levers) -> None:
        """The first picture after compilation was asked for, of two steps: the compiler's time, from torch's cache on
        disk if it has it."""
        begin = time.monotonic()
        workload.ours(2, levers=levers)
        parts.synchronise(self.device)
        self.add(kind=kind, variant=f"first picture, compile={levers.compile}, 2 steps", s=time.monotonic() - begin)

    def compare(
        self,
        kind: str,
        baseline: Callable[[], Any],
        runs: Runs,
        reference: Callable[[], Any] | None,
        rounds: int | None = None,
    ) -> None:
        """Interleaved, with errors against the exact eager path; without a reference, errors would say nothing."""
        result = paired(baseline, runs, rounds=min(rounds or self.rounds, self.rounds), device=self.device)
        expected = None if reference is None else reference().clone()
        error: tuple[float | None, float | None] = (None, None)
        if expected is not None:
            error = relative_error(expected, baseline())
        time_ = result.times["baseline"]
        self.add(
            kind=kind,
            variant="baseline",
            s=time_.median / 1000,
            p95_s=time_.p95 / 1000,
            ms_a_step=time_.median / self.steps,
            max_error_in_std=error[0],
            relative_l2_error=error[1],
        )
        for name, run in runs.items():
            parts.reset_peak(self.device)
            before = parts.allocated(self.device)
            latents = run()
            few = name.startswith("8 steps")  # another number of steps is another picture
            error = (None, None) if expected is None or few else relative_error(latents, expected)
            time_ = result.times[name]
            self.add(
                kind=kind,
                variant=name,
                s=time_.median / 1000,
                p95_s=time_.p95 / 1000,
                ms_a_step=time_.median / (8 if few else self.steps),
                ratio=result.ratios[name].as_dict(),
                max_error_in_std=error[0],
                relative_l2_error=error[1],
                target=_target(kind, name),
                **parts.working_memory(self.device, before),
            )


def _target(kind: str, variant: str) -> str | None:
    return TARGETS.get((kind, variant.split(", ")[0]))


def suite(**settings: Any) -> dict[str, Any]:
    """See :class:`Suite`."""
    with torch.no_grad():
        return Suite(**settings).run()
