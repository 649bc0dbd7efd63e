"""What a portrait says of how it was made: enough to make it again, bit-equal on the same machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from idgen.method import Order
    from idgen.pipeline import Pipeline
    from idgen.speed import Levers

PACKAGES = ("idgen", "torch", "diffusers", "transformers", "insightface")


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of the packages that decide pixels."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


@lru_cache(maxsize=64)
def _hash_file(path: str, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_weights(path: Path) -> str:
    """sha256 of a weight file, or of all weight files in a folder; remembered while size and time stay the same."""
    if path.is_file():
        stat = path.stat()
        return _hash_file(str(path), stat.st_size, stat.st_mtime_ns)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.suffix in (".safetensors", ".bin", ".json", ".onnx"):
            digest.update(str(file.relative_to(path)).encode() + hash_weights(file).encode())
    return digest.hexdigest()


def weight_hashes(pipeline: Pipeline) -> dict[str, str]:
    """sha256 of every weight of a pipeline, by method and role, and of the few-step LoRA merged into its UNet."""
    hashes = {
        f"{method.name}:{role}": hash_weights(path)
        for method in pipeline.methods
        for role, path in method.files.paths.items()
    }
    if pipeline.levers.few_step is not None:
        hashes[f"few_step:{pipeline.levers.few_step}"] = hash_weights(_few_step_file(pipeline))
    return hashes


def _few_step_file(pipeline: Pipeline) -> Path:
    from idgen.few_step import FEW_STEP
    from idgen.locate import locate

    assert pipeline.levers.few_step is not None
    return locate(FEW_STEP[pipeline.levers.few_step].weights[pipeline.backbone.family])


def provenance(pipeline: Pipeline, order: Order, levers: Levers) -> dict[str, Any]:
    """JSON-serialisable: the request with every field decided, the weights' hashes, the versions."""
    request = order.request
    record: dict[str, Any] = {
        "prompt": order.prompt,
        "negative_prompt": order.negative_prompt,
        "pipeline": pipeline.name,
        "width": order.width,
        "height": order.height,
        "steps": order.steps,
        "guidance": order.guidance,
        "identity_scale": order.identity_scale,
        "structure_scale": order.structure_scale,
        "structure_start": request.structure_start,
        "structure_end": request.structure_end,
        "guess_mode": request.guess_mode,
        "scheduler": order.scheduler,
        "strength": request.strength,
    }
    return {
        "request": record,
        "base": pipeline.backbone.source,
        "dtype": str(pipeline.backbone.dtype).removeprefix("torch."),
        "options": {name: value for method in pipeline.methods for name, value in method.files.options.items()},
        "levers": asdict(levers),
        "user_weights": [asdict(weights) for weights in pipeline.backbone.user_weights()],
        "attention": pipeline.attention,
        "weights": weight_hashes(pipeline),
        "versions": versions(),
        "inputs": _inputs(order),
    }


def _inputs(order: Order) -> dict[str, Any]:
    """The names under which the inputs are kept on this machine (see :mod:`idgen.memory`)."""
    from torch import Tensor

    from idgen.images import open_photo
    from idgen.memory import remember

    names: dict[str, Any] = {}
    if order.identity is not None:
        names["who"] = remember(order.identity)
    elif order.pictures:
        names["who"] = [remember(picture) for picture in order.pictures]
    for field in ("image", "mask", "reference", "pose"):
        value = getattr(order.request, field)
        if value is None or isinstance(value, Tensor):
            continue
        points = getattr(value, "ndim", 0) == 2
        names[field] = remember(value if points else open_photo(value))
    return names
