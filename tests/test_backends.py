"""Attention kernels: which one a device gets, that the choice takes effect, and that no stream depends on it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import idgen
from idgen.adapters import backends
from idgen.adapters.backends import DeviceFacts, choose_backend, facts_of, kernels
from idgen.bench.models import SIZES
from idgen.bench.timing import relative_error
from idgen.bench.workloads import Workload
from idgen.errors import BadRequest
from tests import tiny

HOPPER = DeviceFacts("cuda", (9, 0), 90100)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "facts", "expected"),
    [
        (BF16, HOPPER, "cudnn"),
        (FP16, HOPPER, "cudnn"),
        (FP32, HOPPER, "sdpa"),
        (BF16, HOPPER._replace(cudnn=8902), "flash"),
        (BF16, HOPPER._replace(cudnn=0, xformers=True), "flash"),
        (BF16, DeviceFacts("cuda", (10, 0), 90100), "cudnn"),
        (BF16, DeviceFacts("cuda", (12, 0), 90100), "flash"),
        (BF16, DeviceFacts("cuda", (8, 0), 90100, xformers=True), "flash"),
        (FP16, DeviceFacts("cuda", (8, 9), 90100), "flash"),
        (FP16, DeviceFacts("cuda", (7, 5), 90100), "efficient"),
        (FP16, DeviceFacts("cuda", (7, 5), 90100, xformers=True), "xformers"),
        (FP32, DeviceFacts("cuda", (7, 5), xformers=True), "sdpa"),
        (BF16, DeviceFacts("cuda", (9, 4), rocm=True), "sdpa"),
        (FP16, DeviceFacts("mps"), "sdpa"),
        (FP32, DeviceFacts("cpu"), "sdpa"),
        (BF16, DeviceFacts("cpu", xformers=True), "sdpa"),
    ],
)
def test_auto_chooses_by_device_and_number_format_and_says_why(
    dtype: torch.dtype, facts: DeviceFacts, expected: str
) -> None:
    chosen, reason = choose_backend("auto", dtype, facts)
    assert chosen == expected and reason


def test_what_is_asked_for_is_used_and_auto_is_the_default() -> None:
    assert choose_backend("math", BF16, HOPPER) == ("math", "asked for")
    assert facts_of("cpu") == DeviceFacts("cpu")
    pipeline = tiny.load("text-to-image")
    assert pipeline.attention == "sdpa" and pipeline.attention_reason
    assert idgen.load("text-to-image", base=pipeline.backbone, attention="flash").attention == "flash"
    made = pipeline.generate(None, "x", seed=1, **tiny.SMALL)[0]
    assert made.provenance["attention"] == "sdpa"


def test_a_kernel_that_is_not_here_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_has_xformers", lambda: False)
    with pytest.raises(BadRequest, match="pip install"):
        choose_backend("xformers", BF16, HOPPER)
    monkeypatch.setattr(backends, "_orders_kernels", lambda: False)
    with pytest.raises(BadRequest, match=r"torch 2\.6"):
        choose_backend("cudnn", BF16, HOPPER)
    with pytest.raises(BadRequest, match="auto, sdpa"):
        choose_backend("magic", BF16, HOPPER)


def allowed() -> dict[str, bool]:
    return {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
    }


@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient", "math"])
def test_the_preference_holds_within_a_run_and_torchs_own_comes_back(backend: str) -> None:
    order, before = torch._C._get_sdp_priority_order(), allowed()
    with kernels(backend):
        inside = torch._C._get_sdp_priority_order()
        assert allowed()[backend]
        usable = [kernel for kernel in inside if _enabled(kernel)]
        assert usable[0] == int(_KERNELS[backend])
    assert (torch._C._get_sdp_priority_order(), allowed()) == (order, before)
    with kernels("sdpa"):
        assert allowed() == before


_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def _enabled(kernel: int) -> bool:
    names = {int(value): name for name, value in _KERNELS.items()}
    return kernel in names and allowed()[names[kernel]]


def test_the_chosen_kernel_is_preferred_in_every_attention_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, identity, self-attention and ControlNet alike."""
    seen: list[bool] = []
    attention = F.scaled_dot_product_attention

    def watch(*args: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return attention(*args)

    workload = Workload.make("instantid", SIZES["nano"])
    monkeypatch.setattr(backends.F, "scaled_dot_product_attention", watch)
    workload.ours(2, attention="math")
    assert seen and not any(seen)
    calls = len(seen)
    workload.ours(2, attention="auto")
    assert len(seen) == 2 * calls and all(seen[calls:])


@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient", "math"])
def test_regions_of_several_people_come_out_the_same_with_every_kernel(backend: str) -> None:
    """Kernels without masks included: a region weighs what attention returns, it is no mask."""
    workload = Workload.make("regions", SIZES["nano"])
    assert relative_error(workload.ours(3, attention=backend), workload.ours(3))[0] <= 1e-5
