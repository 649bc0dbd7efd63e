"""The parts of the GPU suite that are not ratios: stages, operations, memory, growth, recompilations."""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from idgen.bench.cpu import APPROXIMATE
from idgen.bench.inputs import Inputs
from idgen.bench.models import SIZES, backbone
from idgen.bench.timing import Clock, paired
from idgen.bench.workloads import Workload
from idgen.denoiser import Denoiser
from idgen.speed import Levers

if TYPE_CHECKING:
    from idgen.bench.gpu import Suite

__all__ = ["APPROXIMATE", "SIZES"]

MEASURED_PEAK = 790.0
"""TFLOP/s of bfloat16 products on an H100 as measured, not the data sheet's 989."""


def free(device: str) -> None:
    """Give back what the last part held."""
    torch._dynamo.reset()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> dict[str, float]:
    """Since the part began; with two models in memory it counts both."""
    if not device.startswith("cuda"):
        return {}
    return {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def stages(suite: Suite) -> None:
    """One step of the UNet, of UNet and IdentityNet, one VAE decode; operations; the floor that they set."""
    from torch.utils.flop_counter import FlopCounterMode

    clock = Clock(suite.device)
    begin = time.monotonic()
    workload = suite.make("instantid")
    suite.rows.append({"variant": "load (models with random weights)", "s": time.monotonic() - begin})
    for kind in ("ip-adapter", "instantid"):
        like = Workload.make(kind, suite.size, suite.device, suite.dtype, like=workload)
        x = like.inputs.noise
        t = torch.tensor(500, device=x.device)
        with Denoiser(
            like.backbone.unet, like.conditioning(), x, guided=True, attention="sdpa", levers=Levers()
        ) as denoise:
            denoise(x, t, 0, 1)
            times = sorted(clock.measure(partial(denoise, x, t, 0, 1)) for _ in range(5))
            with FlopCounterMode(display=False) as counter:
                denoise(x, t, 0, 1)
        tera = counter.get_total_flops() / 1e12
        achieved = tera / (times[2] / 1000)
        suite.rows.append(
            {
                "kind": kind,
                "variant": "one guided step",
                "ms_a_step": times[2],
                "tflop": round(tera, 3),
                "tflop_s": round(achieved, 1),
                "share_of_floor": round(achieved / MEASURED_PEAK, 3),
                **peak_memory(suite.device),
            }
        )
    del workload, like
    free(suite.device)
    decoder = backbone(suite.size, suite.device, suite.dtype, vae=suite.size.name != "nano")
    latents = Inputs.random(suite.size, suite.device, suite.dtype).noise
    decoder.decode(latents)
    times = sorted(clock.measure(lambda: decoder.decode(latents)) for _ in range(3))
    suite.rows.append({"variant": "VAE decode, one picture", "s": times[1] / 1000, **peak_memory(suite.device)})


def growth(suite: Suite) -> None:
    """1, 2 and 4 identities with regions, against diffusers' masks."""
    base = suite.make("ip-adapter")
    for people in (2, 4):
        workload = Workload.make("regions", suite.size, suite.device, suite.dtype, people=people, like=base)
        baseline = workload.baseline()
        steps = max(2, suite.steps // 5)
        result = paired(
            partial(baseline, steps),
            {"exact": partial(workload.ours, steps)},
            rounds=min(3, suite.rounds),
            device=suite.device,
        )
        row = {"kind": "regions", "variant": f"{people} identities", "ratio": result.ratios["exact"].as_dict()}
        suite.rows.append(row | {"ms_a_step": result.times["exact"].median / steps})


def recompilations(suite: Suite) -> None:
    """How often torch.compile compiles again over a sweep of scale and identity (prompt and seed go with it)."""
    from torch._dynamo.utils import counters

    workload = suite.make("instantid", Levers(compile="regional"))
    levers = Levers(compile="regional")
    workload.ours(1, levers=levers)
    before = counters["stats"]["unique_graphs"]
    for seed, scale in enumerate((0.2, 0.5, 0.9), start=1):
        workload.inputs = Inputs.random(suite.size, suite.device, suite.dtype, seed=seed)
        workload.inputs.scale = workload.inputs.structure_scale = scale
        workload.ours(1, levers=levers)
    added = counters["stats"]["unique_graphs"] - before
    suite.rows.append({"variant": "recompilations over scale, identity, prompt, seed", "count": added})


def compiled_baseline(suite: Suite) -> None:
    """Baseline (iii): the stock pipeline with the public torch.compile and channels_last."""
    workload = suite.make("ip-adapter")
    stock, fast = workload.baseline(), workload.baseline()
    fast.pipe.unet.to(memory_format=torch.channels_last)
    fast.pipe.unet.compile(mode="reduce-overhead" if suite.device.startswith("cuda") else None, fullgraph=True)
    result = paired(
        lambda: stock(suite.steps),
        {"compiled": lambda: fast(suite.steps)},
        rounds=min(3, suite.rounds),
        device=suite.device,
    )
    suite.rows.append(
        {
            "kind": "ip-adapter",
            "variant": "stock with torch.compile and channels_last",
            "s": result.times["compiled"].median / 1000,
            "ratio": result.ratios["compiled"].as_dict(),
        }
    )


def sd15(suite: Suite) -> None:
    """The other family, at 512 pixels."""
    size: Any = SIZES["sd15"] if suite.size.name == "sdxl" else SIZES["nano15"]
    workload = Workload.make("ip-adapter", size, suite.device, suite.dtype)
    workload.prepare(Levers())
    baseline = workload.baseline()
    steps = suite.steps
    result = paired(
        lambda: baseline(steps),
        {"exact": lambda: workload.ours(steps)},
        rounds=min(3, suite.rounds),
        device=suite.device,
    )
    suite.rows.append(
        {
            "kind": "sd15 ip-adapter",
            "variant": "exact",
            "s": result.times["exact"].median / 1000,
            "ratio": result.ratios["exact"].as_dict(),
        }
    )
