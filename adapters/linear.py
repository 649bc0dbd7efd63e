"""``F.linear`` through the faster of torch's two CPU libraries.

torch sends float32 matrix products to MKL, which keeps its wide kernels for the maker's own processors; oneDNN, which
torch ships as well and uses for convolutions and bfloat16, has no such preference. On an AMD EPYC with AVX-512 the
products of a UNet run 2.1 to 2.4 times faster (docs/performance.md). Other devices and formats take ``F.linear``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WORTHWHILE = 4_000_000
"""Multiplications below which oneDNN's fixed cost of about 10 microseconds outweighs its speed."""


def _find_onednn() -> bool:
    """Whether torch's oneDNN linear is here and right; it is an inner function of torch, so this is tried out."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        return False
    try:
        x, weight, bias = torch.arange(6.0).view(1, 2, 3), torch.arange(12.0).view(4, 3), torch.ones(4)
        with torch.no_grad():
            ours = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return torch.allclose(ours, F.linear(x, weight, bias))
    except (AttributeError, RuntimeError, TypeError):
        return False


ONEDNN = _find_onednn()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b; (..., in), (out, in), (out,) -> (..., out). For inference: it has no gradient on the CPU."""
    if (
        ONEDNN
        and weight.is_cpu
        and x.dtype is torch.float32
        and x.numel() * weight.shape[0] >= WORTHWHILE
        and torch.backends.mkldnn.enabled
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
