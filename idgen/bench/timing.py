"""Paired timing: A and B alternate in one process, so that whatever else the machine does falls on both."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

Run = Callable[[], Any]


class Clock:
    """Milliseconds of one call: CUDA events on a GPU; process CPU time elsewhere, which other processes do not add to.

    CPU time equals elapsed time only with one thread, which the bench sets.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.unit = "ms by CUDA events" if self.cuda else "ms of process CPU time, one thread"

    def measure(self, run: Run) -> float:
        """Run once."""
        if not self.cuda:
            before = time.process_time()
            run()
            return (time.process_time() - before) * 1000
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


@dataclass(frozen=True)
class Summary:
    """Of repeated times in ms."""

    median: float
    p95: float
    lowest: float
    count: int

    @classmethod
    def of(cls, times: list[float]) -> Summary:
        """p95 by nearest rank; with few repetitions it is the largest."""
        ordered = sorted(times)
        return cls(
            statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], ordered[0], len(times)
        )


@dataclass(frozen=True)
class Ratio:
    """How many times faster B is than A: the median over pairs, and the quartiles."""

    median: float
    low: float
    high: float
    noise_low: float
    noise_high: float
    """The quartiles of A against itself in the same rounds: differences inside them mean nothing."""

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Paired:
    """One interleaved measurement: the baseline, and each variant against it."""

    times: dict[str, Summary]
    ratios: dict[str, Ratio]


def paired(
    baseline: Run, variants: Mapping[str, Run], *, rounds: int, device: str = "cpu", warm: bool = True
) -> Paired:
    """Measure ``rounds`` times: baseline, every variant, baseline again.

    A variant's ratio in a round is that to the mean of the round's two baselines; the second baseline against the first
    gives the A/A noise.
    """
    clock = Clock(device)
    if warm:
        for run in (baseline, *variants.values()):
            run()
    first: list[float] = []
    second: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in variants}

    def measure(run: Run) -> float:
        # Else whoever comes first after a collection is spared one that the others pay for.
        gc.collect()
        return clock.measure(run)

    for number in range(rounds):
        first.append(measure(baseline))
        # Every other round backwards: a machine that slowly gets busier must not favour the first.
        for name in [*variants][:: 1 if number % 2 == 0 else -1]:
            times[name].append(measure(variants[name]))
        second.append(measure(baseline))
    noise = quartiles([a / b for a, b in zip(first, second)])
    ratios = {}
    for name, values in times.items():
        pairs = [(a + c) / 2 / b for a, b, c in zip(first, values, second)]
        ratios[name] = Ratio(statistics.median(pairs), *quartiles(pairs), *noise)
    summaries = {"baseline": Summary.of(first + second), **{name: Summary.of(v) for name, v in times.items()}}
    return Paired(summaries, ratios)


def quartiles(values: list[float]) -> tuple[float, float]:
    """The lower and the upper one; of a single value, itself twice."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(largest absolute difference in units of the reference's standard deviation, relative L2 difference)."""
    a, b = ours.float().cpu(), reference.float().cpu()
    return float((a - b).abs().max() / b.std()), float((a - b).norm() / b.norm())
