"""What this machine has, what idgen will choose on it, and what is in the way of each pipeline.

Every probe stands alone: a broken package becomes a line in the report, never the end of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Distributions that provide the same module; any one of them will do.
_SUBSTITUTES = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-silicon"),
    "opencv-python-headless": ("opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python"),
}
_EXTRAS = ("cuda", "demo", "serve", "cluster", "bench")
# An ONNX graph of one Neg node: the smallest thing that makes onnxruntime load a provider.
_TINY_ONNX = (
    b'\x08\x07:2\n\x0b\n\x01x\x12\x01y"\x03Neg\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


@dataclass
class Package:
    """An installed or missing distribution. ``extra`` is None for what idgen cannot do without."""

    name: str
    version: str | None
    extra: str | None = None
    cure: str = ""


@dataclass
class Device:
    """Something to compute on. Memory in bytes, None where the system does not say."""

    name: str
    description: str
    memory_total: int | None = None
    memory_free: int | None = None
    compute_capability: str | None = None
    bf16: bool | None = None


@dataclass
class PipelineState:
    """Whether a pipeline can run: on which bases, and what each other base lacks or why it is refused."""

    name: str
    description: str
    runs_on: list[str]
    lacks: dict[str, list[str]]
    refused: dict[str, str]
    cures: dict[str, str]


@dataclass
class Report:
    """Everything that ``idgen doctor`` shows. Sizes in bytes."""

    versions: dict[str, str] = field(default_factory=dict)
    packages: list[Package] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    choice: dict[str, str] = field(default_factory=dict)
    onnxruntime: dict[str, Any] = field(default_factory=dict)
    pipelines: list[PipelineState] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def can_run(self) -> bool:
        """Whether at least one pipeline can make a portrait here and now."""
        return bool(self.choice) and any(pipeline.runs_on for pipeline in self.pipelines)

    def as_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return {**asdict(self), "can_run": self.can_run}


def diagnose() -> Report:
    """Look at everything. Takes a few seconds, as it imports torch and onnxruntime; uses no network."""
    report = Report()
    for probe in (_versions, _packages, _devices, _choice, _onnxruntime, _weights, _pipelines):
        _guarded(probe, report)
    return report


def _guarded(probe: Callable[[Report], None], report: Report) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probe(report)
    except Exception as error:
        what = probe.__name__.lstrip("_")
        report.problems.append(f"{what}: {type(error).__name__}: {str(error).strip() or 'no message'}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(report: Report) -> None:
    from idgen import __version__

    report.versions = {
        "idgen": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
    }


def _packages(report: Report) -> None:
    """Compare idgen's own requirements with what is installed, so that there is no second list to keep."""
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("idgen") or []:
        need = Requirement(line)
        extra = next((e for e in _EXTRAS if need.marker and f'extra == "{e}"' in str(need.marker)), None)
        if need.name == "idgen" or (need.marker and not need.marker.evaluate({"extra": extra or ""})):
            continue
        if any(package.name == need.name for package in report.packages):
            continue
        names = (need.name, *_SUBSTITUTES.get(need.name, ()))
        name = next((n for n in names if _version(n)), need.name)
        version = _version(name)
        package = Package(name, version, extra)
        if version is None:
            package.cure = f'pip install "idgen[{extra}]"' if extra else f'pip install "{need.name}{need.specifier}"'
        elif not need.specifier.contains(version, prereleases=True):
            package.cure = f'pip install --upgrade "{need.name}{need.specifier}"'
        report.packages.append(package)
        if package.cure and not extra:
            report.problems.append(f"{name} is {version or 'missing'}. Cure: {package.cure}")
    for module in ("torch", "onnxruntime", "cv2", "PIL"):
        try:
            importlib.import_module(module)
        except Exception as error:  # a missing shared library raises OSError, a broken wheel anything
            report.problems.append(f"{module} does not import ({error}). Cure: reinstall it with pip.")
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        report.problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other. "
            "Cure: pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu"
        )


def _devices(report: Report) -> None:
    import torch

    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        capability = f"{facts.major}.{facts.minor}"
        report.devices.append(Device(f"cuda:{i}", facts.name, total, free, capability, facts.major >= 8))
    if torch.backends.mps.is_available():
        limit = getattr(torch.mps, "recommended_max_memory", lambda: None)()
        report.devices.append(Device("mps", "Apple GPU", limit))
    report.devices.append(_cpu())
    report.versions["torch's cuda"] = str(torch.version.cuda or torch.version.hip or "none (CPU build)")
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        why = "torch is a CPU build" if not torch.version.cuda else "torch cannot use it"
        report.problems.append(
            f"an NVIDIA driver is installed, but {why}. Cure: install a CUDA build of torch (pytorch.org/get-started)"
        )


def _cpu() -> Device:
    import torch

    facts: dict[str, Any] = {}
    if hasattr(torch.cpu, "get_capabilities"):  # newer versions of torch only
        facts = dict(torch.cpu.get_capabilities())
    level = torch.backends.cpu.get_cpu_capability()
    flags = [
        name
        for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "avx512_fp16", "neon", "bf16")
        if facts.get(name)
    ]
    name = facts.get("cpu_name") or platform.processor() or platform.machine()
    bf16 = any(facts.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")) if facts else None
    total = free = None
    try:
        import psutil  # comes with accelerate

        total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    except ImportError:
        pass
    text = f"{name}, {os.cpu_count()} threads, {level}" + (f" ({', '.join(flags)})" if flags else "")
    return Device("cpu", text, total, free, None, bf16)


def _choice(report: Report) -> None:
    from idgen.adapters.backends import choose_backend, facts_of
    from idgen.backbone import DTYPES, choose_device, choose_dtype

    device, device_reason = choose_device("auto")
    dtype, dtype_reason = choose_dtype(device, "auto")
    attention, attention_reason = choose_backend("auto", DTYPES[dtype], facts_of(device))
    report.choice = {"device": device, "device_reason": device_reason, "dtype": dtype, "dtype_reason": dtype_reason}
    report.choice |= {"attention": attention, "attention_reason": attention_reason}


def _onnxruntime(report: Report) -> None:
    """Ask for CUDA and look at what was really loaded: onnxruntime falls back to the CPU without a word."""
    import onnxruntime

    offered = onnxruntime.get_available_providers()
    report.onnxruntime = {"version": onnxruntime.__version__, "providers": offered, "cuda_loads": False, "reason": ""}
    has_gpu = any(device.name.startswith("cuda") for device in report.devices)
    if "CUDAExecutionProvider" not in offered:
        report.onnxruntime["reason"] = "this onnxruntime is a build without CUDA"
        if has_gpu:
            report.problems.append(
                "faces are found on the CPU although there is a GPU: onnxruntime is a build without CUDA. "
                "Cure: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
            )
        return
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the reason is in the exception or in the providers; keep stderr clean
    try:
        session = onnxruntime.InferenceSession(
            _TINY_ONNX, options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
        )
        loads = "CUDAExecutionProvider" in session.get_providers()
        reason = "" if loads else "it fell back to the CPU (no GPU, or CUDA and cuDNN libraries that do not match)"
    except Exception as error:
        loads, reason = False, str(error).strip().splitlines()[0]
    report.onnxruntime.update(cuda_loads=loads, reason=reason)
    if has_gpu and not loads:
        report.problems.append(
            f"faces are found on the CPU although there is a GPU: onnxruntime's CUDA provider does not load: {reason}. "
            "Cure: install the CUDA and cuDNN versions that this onnxruntime-gpu wants (onnxruntime.ai, CUDA provider)"
        )


def _weights(report: Report) -> None:
    from huggingface_hub import constants

    from idgen.weights.store import Store, commercial_only, mini_dir

    store = Store()
    mini = mini_dir()
    cache = Path(constants.HF_HUB_CACHE)
    report.weights = {
        "idgen_home": str(store.root),
        "idgen_home_free": _free(store.root),
        "hub_cache": str(cache),
        "hub_cache_free": _free(cache),
        "hub_endpoint": constants.ENDPOINT,
        "offline": bool(constants.HF_HUB_OFFLINE),
        "commercial_only": commercial_only(),
        "mini": str(mini) if mini else None,
        "present": store.present(),
    }


def _free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _pipelines(report: Report) -> None:
    from idgen.registry import pipelines
    from idgen.weights.manifest import load_manifest
    from idgen.weights.store import commercial_only

    manifest, strict = load_manifest(), commercial_only()
    for info in pipelines():
        state = PipelineState(info.name, info.description, [], {}, {}, {})
        for base in info.bases:
            lacking = list(info.missing.get(base, ()))
            terms = info.commercial.get(base, True)
            if strict and terms is not True:
                state.refused[base] = "unclear licence" if terms == "unclear" else "not for commercial use"
            elif lacking:
                state.lacks[base] = lacking
                pull = [name for name in lacking if name in manifest]
                flag = "" if terms is True else " --accept-licence"
                state.cures[base] = f"idgen weights pull {' '.join(pull)}{flag}" if pull else "reinstall idgen"
            else:
                state.runs_on.append(base)
        report.pipelines.append(state)
    if not any(state.runs_on for state in report.pipelines):
        report.problems.append("no pipeline can run: no complete set of weights is here. See what each lacks.")
