"""Which kernel computes softmax attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from idgen.errors import BadRequest

BACKENDS = ("sdpa", "flash", "cudnn", "efficient", "math", "xformers")


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """Softmax attention with scale 1/sqrt(head width).

    Args:
        q: (B, H, L, d). k, v: (B, H, S, d).
        backend: one of ``BACKENDS``; ``sdpa`` lets torch choose.
    Returns:
        (B, H, L, d).
    """
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        out = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }[backend]
    with sdpa_kernel([kernel, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v)


def check_backend(backend: str) -> str:
    """Return ``backend``, or raise :class:`BadRequest` naming what there is."""
    if backend not in BACKENDS:
        raise BadRequest(f"attention backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}.", "attention")
    if backend == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError:
            raise BadRequest(
                "attention backend 'xformers' needs the xformers package: pip install 'idgen[cuda]'.", "attention"
            ) from None
    return backend
