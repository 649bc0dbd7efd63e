"""Peak memory of full-size models, computed: the sampler runs on the meta device and every live tensor is counted.

No weight and no GPU is needed. What it cannot see is the allocator's rounding, cuDNN's workspaces and the CUDA context;
``OVERHEAD`` stands for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from idgen.adapters import control
from idgen.bench import models
from idgen.bench.inputs import Inputs
from idgen.denoiser import Denoiser
from idgen.speed import Levers

OVERHEAD = 0.7
"""GiB: context, workspaces, fragmentation. A usual figure, to be replaced by a measured one."""

TEXT_ENCODERS = {"sdxl": 818e6, "sd15": 123e6}
"""Parameters of the text encoders of SDXL (CLIP ViT-L and OpenCLIP bigG) and SD1.5 (CLIP ViT-L)."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside the context that are alive, and their peak."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        """existing: tensors made before, whose views are nothing new."""
        super().__init__()
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@contextmanager
def fused_attention() -> Iterator[None]:
    """On the meta device torch would take the attention that stores all scores; a GPU takes one that does not."""
    with (
        patch.object(F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: torch.empty_like(q)),
        # Values cannot be compared on the meta device; the rows of one picture are equal.
        patch.object(control, "first_if_equal", lambda rows: rows[:1]),
    ):
        yield


def parameters_gib(*networks: Any) -> float:
    """Of modules, in their own dtype."""
    return sum(p.numel() * p.element_size() for network in networks for p in network.parameters()) / 2**30


def peaks(name: str = "sdxl", instantid: bool = True, pixels: int = 1024, lean: bool = True) -> dict[str, float]:
    """GiB of weights and of what one guided step and one VAE decode need beside them, in bfloat16 at batch 1.

    Args:
        name: ``sdxl`` or ``sd15`` (or a miniature of either).
        lean: whether self-attention's projections are fused (see :class:`idgen.speed.Levers`), which copies them.
    """
    from dataclasses import replace

    size = models.SIZES[name]
    size = replace(size, latent=pixels // 8)
    backbone = models.backbone(size, "meta", "bfloat16", vae=True)
    network = models.controlnet(size, "meta", "bfloat16") if instantid else None
    inputs = Inputs.random(size, "meta", "bfloat16")
    weights = models.stream_weights(backbone.unet)
    stream = sum(w.numel() * 2 for table in (weights.key, weights.value) for w in table.values()) / 2**30
    conditioning = inputs.instantid(weights, network)
    if network is None:
        conditioning.branches.clear()
    networks = [backbone.unet, backbone.vae, *([network] if network is not None else [])]
    existing = [p for each in networks for p in each.parameters()]
    existing += [*weights.key.values(), *weights.value.values(), inputs.tokens, inputs.control, inputs.noise]
    step = _peak(lambda: _one_step(backbone.unet, conditioning, inputs.noise, lean), existing)
    decode = _peak(lambda: backbone.vae.decode(inputs.noise), existing)
    return {
        "unet": parameters_gib(backbone.unet),
        "identitynet": parameters_gib(network) if network is not None else 0.0,
        "identity_keys_and_values": stream,
        "text_encoders": TEXT_ENCODERS.get(name, 0.0) * 2 / 2**30,
        "vae": parameters_gib(backbone.vae),
        "one_step": step,
        "vae_decode": decode,
        "vae_decode_tile": decode * min(1.0, (512 / pixels) ** 2),
    }


def _one_step(unet: Any, conditioning: Any, x: Tensor, lean: bool) -> None:
    with Denoiser(unet, conditioning, x, guided=True, attention="sdpa", levers=Levers(lean=lean)) as denoise:
        denoise(x, torch.tensor(500, device=x.device), 0, 1)


@torch.no_grad()
def _peak(work: Callable[[], Any], existing: list[Tensor]) -> float:
    with fused_attention(), LiveBytes(existing) as counter:
        work()
    return counter.peak / 2**30


def card_peak(parts: dict[str, float], *, offload: str | None = None, vae_tiling: bool = False) -> float:
    """The peak of a request in GiB, with models resident or waiting on the CPU until they are called.

    IdentityNet and the identity's keys and values stay on the GPU under ``offload="model"``.
    """
    decode = parts["vae_decode_tile"] if vae_tiling else parts["vae_decode"]
    always = parts["identitynet"] + parts["identity_keys_and_values"]
    if offload == "model":
        needs = (parts["unet"] + parts["one_step"], parts["text_encoders"], parts["vae"] + decode)
        return always + max(needs) + OVERHEAD
    if offload == "sequential":
        return always + max(parts["one_step"], parts["vae"] + decode) + OVERHEAD
    resident = always + parts["unet"] + parts["text_encoders"] + parts["vae"]
    return resident + max(parts["one_step"], decode) + OVERHEAD
