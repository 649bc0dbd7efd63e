"""The parts of the GPU suite that are not its main comparisons: stages, compilation, loading, the other base."""

from __future__ import annotations

import gc
import tempfile
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from idgen.bench.cpu import APPROXIMATE
from idgen.bench.first import first_picture_of
from idgen.bench.inputs import Inputs
from idgen.bench.models import SIZES, backbone
from idgen.bench.timing import Clock, paired
from idgen.denoiser import Denoiser
from idgen.speed import Levers

if TYPE_CHECKING:
    from idgen.bench.gpu import Suite

__all__ = ["APPROXIMATE", "SIZES"]

MEASURED_PEAK = 790.0
"""TFLOP/s of bfloat16 products on an H100 as measured, not the data sheet's 989."""


def free(device: str) -> None:
    """Give back what the last part held. Resetting dynamo also ends CUDA graph trees, and with them their memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronise(device: str) -> None:
    """Wait until the GPU has done all that it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    """Count the peak from now on."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def allocated(device: str) -> int:
    """Bytes of live tensors."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else 0


def peak_memory(device: str) -> dict[str, float]:
    """Of everything on the device: for parts that hold one set of models."""
    return {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if device.startswith("cuda") else {}


def working_memory(device: str, before: int) -> dict[str, float]:
    """What a run took beyond the models: for parts that hold several. What CUDA graphs keep was there before it."""
    if not device.startswith("cuda"):
        return {}
    return {"working_gib": round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)}


def stages(suite: Suite) -> None:
    """One step of the UNet, of UNet and IdentityNet, one VAE decode; operations; the floor that they set."""
    begin = time.monotonic()
    workload = suite.prepared("instantid")
    synchronise(suite.device)
    suite.add(variant="models with random weights made on the device", s=time.monotonic() - begin)
    for kind in ("ip-adapter", "instantid"):
        _step(suite, suite.workload(kind, like=workload))
    del workload
    free(suite.device)
    decoder = backbone(suite.size, suite.device, suite.dtype, vae=suite.size.name != "nano")
    decoder.pipe.unet = None
    free(suite.device)
    latents = Inputs.random(suite.size, suite.device, suite.dtype).noise
    decoder.decode(latents)
    clock = Clock(suite.device)
    times = sorted(clock.measure(lambda: decoder.decode(latents)) for _ in range(3))
    suite.add(variant="VAE decode, one picture", s=times[1] / 1000, **peak_memory(suite.device))


def _step(suite: Suite, workload: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    clock, x = Clock(suite.device), workload.inputs.noise
    t = torch.tensor(500, device=x.device)
    conditioning, levers = workload.conditioning(), Levers()
    network = Denoiser(workload.backbone.unet, conditioning, x, guided=True, attention="sdpa", levers=levers)
    with network as denoise:
        denoise(x, t, 0, 1)
        reset_peak(suite.device)
        times = sorted(clock.measure(partial(denoise, x, t, 0, 1)) for _ in range(5))
        memory = peak_memory(suite.device)
        with FlopCounterMode(display=False) as counter:
            denoise(x, t, 0, 1)
    tera = counter.get_total_flops() / 1e12
    achieved = tera / (times[2] / 1000)
    suite.add(
        kind=workload.kind,
        variant="one guided step",
        ms_a_step=times[2],
        tflop=round(tera, 3),
        tflop_s=round(achieved, 1),
        share_of_floor=round(achieved / MEASURED_PEAK, 3),
        **memory,
    )


def recompilations(suite: Suite) -> None:
    """How often torch.compile compiles again over a sweep of scale and identity (prompt and seed go with it), and when
    the picture's size changes to a half and back."""
    from torch._dynamo.utils import counters

    levers = Levers(compile="regional")
    workload = suite.prepared("instantid", levers)
    workload.ours(1, levers=levers)
    before = counters["stats"]["unique_graphs"]
    for seed, scale in enumerate((0.2, 0.5, 0.9), start=1):
        workload.inputs = Inputs.random(suite.size, suite.device, suite.dtype, seed=seed)
        workload.inputs.scale = workload.inputs.structure_scale = scale
        workload.ours(1, levers=levers)
    added = counters["stats"]["unique_graphs"] - before
    suite.add(variant="recompilations over scale, identity, prompt, seed", count=added)
    before = counters["stats"]["unique_graphs"]
    for latent in (suite.size.latent // 2, suite.size.latent, suite.size.latent // 2):
        workload.resize(latent)
        workload.ours(1, levers=levers)
    added = counters["stats"]["unique_graphs"] - before
    suite.add(variant="recompilations for another size, back, and there again", count=added)


def compiled_baseline(suite: Suite, kind: str) -> None:
    """Baseline (iii): the stock loop with the public torch.compile and channels_last, against the stock loop."""
    workload = suite.workload(kind)
    stock, fast = workload.baseline(), workload.baseline()
    del workload
    fast.compile()
    begin = time.monotonic()
    fast(2)
    synchronise(suite.device)
    suite.add(kind=kind, variant="stock with torch.compile, first picture of 2 steps", s=time.monotonic() - begin)
    runs = {"compiled": partial(fast, suite.steps)}
    result = paired(partial(stock, suite.steps), runs, rounds=min(3, suite.rounds), device=suite.device)
    suite.add(
        kind=kind,
        variant="stock with torch.compile and channels_last",
        s=result.times["compiled"].median / 1000,
        p95_s=result.times["compiled"].p95 / 1000,
        ratio=result.ratios["compiled"].as_dict(),
    )


def attention_backends(suite: Suite) -> None:
    """The exact path with each kernel that is here, against the one that torch chooses."""
    from idgen.adapters.backends import BACKENDS, check_backend
    from idgen.errors import BadRequest

    workload = suite.prepared("ip-adapter")
    steps = max(2, suite.steps // 5)
    runs = {}
    for name in BACKENDS:
        try:
            check_backend(name)
        except BadRequest:
            continue
        if name not in ("sdpa", "math"):  # math is there for checking: its scores fill the memory
            runs[name] = partial(workload.ours, steps, attention=name)
    plain = partial(workload.ours, steps)
    result = paired(plain, runs, rounds=min(3, suite.rounds), device=suite.device)
    for name in runs:
        suite.add(
            kind="ip-adapter",
            variant=f"attention={name} against sdpa",
            ms_a_step=result.times[name].median / steps,
            ratio=result.ratios[name].as_dict(),
        )


def first_picture(suite: Suite) -> None:
    """A new process from its start to its first picture and its second; and a network's way from disk to the device."""
    from idgen.adapters.control import load_controlnet
    from idgen.bench.models import controlnet

    for stage, seconds in first_picture_of(
        "random", size=suite.size.name, device=suite.device, dtype=suite.dtype, steps=suite.steps
    ).items():
        suite.add(kind="instantid", variant=f"new process: {stage}", s=seconds)
    network = controlnet(suite.size, suite.device, suite.dtype)
    gigabytes = sum(p.numel() * p.element_size() for p in network.parameters()) / 1e9
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        del network
        free(suite.device)
        begin = time.monotonic()
        load_controlnet(folder, suite.device, getattr(torch, suite.dtype))
        synchronise(suite.device)
        spent = time.monotonic() - begin
    suite.add(variant=f"load IdentityNet from disk, {gigabytes:.1f} GB just written", s=spent)


def sd15(suite: Suite) -> None:
    """The other family, at 512 pixels."""
    from idgen.bench.workloads import Workload

    size: Any = SIZES["sd15"] if suite.size.name == "sdxl" else SIZES["nano15"]
    workload = Workload.make("ip-adapter", size, suite.device, suite.dtype)
    baseline = workload.baseline()
    workload.prepare(Levers())
    runs = {"exact": partial(workload.ours, suite.steps)}
    result = paired(partial(baseline, suite.steps), runs, rounds=min(3, suite.rounds), device=suite.device)
    suite.add(
        kind="sd15 ip-adapter",
        variant="exact",
        s=result.times["exact"].median / 1000,
        p95_s=result.times["exact"].p95 / 1000,
        ratio=result.ratios["exact"].as_dict(),
    )
