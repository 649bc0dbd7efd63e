"""Which kernel computes softmax attention, and on what grounds it is chosen.

No stream, region or reference needs an attention mask: regions weigh the result, references lengthen keys and values.
So every kernel serves every request.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from idgen.errors import BadRequest

BACKENDS = ("auto", "sdpa", "flash", "cudnn", "efficient", "math", "xformers")
"""``auto`` chooses by the device (:func:`choose_backend`), ``sdpa`` lets torch choose at every call."""

_FIRST = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
# What torch tries where the chosen kernel cannot take a head width or a number format.
_THEN = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


class DeviceFacts(NamedTuple):
    """What the choice depends on."""

    kind: str
    """``cpu``, ``cuda`` or ``mps``"""
    capability: tuple[int, int] = (0, 0)
    """of a CUDA device"""
    cudnn: int = 0
    """cuDNN's version as torch gives it, 90100 for 9.1; 0 where there is none"""
    xformers: bool = False
    rocm: bool = False


def facts_of(device: str | torch.device) -> DeviceFacts:
    """The facts of a device of this machine."""
    device = torch.device(device)
    if device.type != "cuda":
        return DeviceFacts(device.type)
    return DeviceFacts(
        "cuda",
        torch.cuda.get_device_capability(device),
        torch.backends.cudnn.version() or 0,
        _has_xformers(),
        torch.version.hip is not None,
    )


def choose_backend(backend: str, dtype: torch.dtype, facts: DeviceFacts) -> tuple[str, str]:
    """The backend to use, never ``auto``, and why.

    Raises:
        BadRequest: the backend is unknown, or its package is not installed.
    """
    check_backend(backend)
    if backend != "auto":
        return backend, "asked for"
    if facts.kind != "cuda" or facts.rocm:
        return "sdpa", "torch's own choice is the only one here"
    if dtype == torch.float32:
        return "sdpa", "the fused kernels for float32 are torch's own choice"
    if facts.capability[0] in (9, 10) and facts.cudnn >= 90000:
        return "cudnn", "on Hopper and Blackwell cuDNN's kernel is faster than the FlashAttention-2 in torch"
    if facts.capability >= (8, 0):
        return "flash", "FlashAttention runs in half precision from Ampere on"
    if facts.xformers:
        return "xformers", "torch's FlashAttention needs Ampere; xformers is installed and does not"
    return "efficient", "FlashAttention needs Ampere; the memory-efficient kernel does not"


@contextmanager
def kernels(backend: str) -> Iterator[None]:
    """Within it torch prefers the kernel ``backend``. The preference is torch's own and holds for the whole process,
    for speed only: any thread's attention stays right whatever is preferred."""
    if backend in ("sdpa", "xformers"):
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Without the order torch would take any other allowed kernel before cuDNN's, even the slow one.
    names = dict.fromkeys(["MATH"] if backend == "math" else [_FIRST[backend], *_THEN])
    order: dict[str, Any] = {"set_priority": True} if backend == "cudnn" else {}
    if backend == "efficient":
        names.pop("FLASH_ATTENTION")
    with sdpa_kernel([getattr(SDPBackend, name) for name in names], **order):
        yield


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """Softmax attention with scale 1/sqrt(head width).

    Args:
        q: (B, H, L, d). k, v: (B, H, S, d).
        backend: ``xformers``, or anything else for torch with the preference of :func:`kernels`.
    Returns:
        (B, H, L, d).
    """
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        out = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v)


def check_backend(backend: str) -> str:
    """Return ``backend``, or raise :class:`BadRequest` naming what there is."""
    if backend not in BACKENDS:
        raise BadRequest(f"attention backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}.", "attention")
    if backend == "xformers" and not _has_xformers():
        raise BadRequest(
            "attention backend 'xformers' needs the xformers package: pip install 'idgen[cuda]'.", "attention"
        )
    if backend == "cudnn" and not _orders_kernels():
        raise BadRequest("attention backend 'cudnn' needs torch 2.6 or later.", "attention")
    return backend


def _orders_kernels() -> bool:
    import inspect

    from torch.nn.attention import sdpa_kernel

    return "set_priority" in inspect.signature(sdpa_kernel).parameters


def _has_xformers() -> bool:
    try:
        import xformers.ops  # noqa: F401
    except ImportError:
        return False
    return True
