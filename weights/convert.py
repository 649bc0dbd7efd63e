"""Weights in another number format: what is stored as it is served is mapped from the disk, not read and converted."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from idgen.errors import BadRequest, BadWeights

DTYPES = ("bfloat16", "float16", "float32")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
VARIANT = re.compile(r"\.(fp16|bf16|fp32)(?=\.safetensors$)")
"""Part of a file's name, as in ``model.fp16.safetensors``. Copies have none: they are found without ``variant``."""


def convert(source: str | Path, dest: str | Path, dtype: str = "bfloat16") -> Path:
    """Write the weights of ``source`` to ``dest`` with every floating-point tensor in ``dtype``.

    Loading the copy in ``dtype`` gives the same bits as loading the original in it. Each file is held in memory once,
    in the new format, while it is written. Nothing is at ``dest`` before all of it is.

    Args:
        source: a ``.safetensors`` file, or a folder of a base, a ControlNet or an encoder. Of files that are there
            in several formats the one without a variant's name is taken; pickles beside them are left out.
        dest: a new file that ends in ``.safetensors``, or a new folder.
        dtype: one of ``DTYPES``.
    Raises:
        BadRequest: there is nothing at ``source`` or something at ``dest``; the format is unknown; the disk is full.
        BadWeights: a file is damaged or a pickle, or a value does not fit the format; names the file and the tensor.
    """
    source, dest = Path(source), Path(dest)
    if dtype not in DTYPES:
        raise BadRequest(f"dtype {dtype!r} is unknown; choose {', '.join(DTYPES)}.", "dtype")
    if not source.exists():
        raise BadRequest(f"there is no file or folder {source}.", "source")
    if dest.exists():
        raise BadRequest(f"{dest} is there already; name a new file or folder.", "dest")
    if source.is_file() and not source.suffix == dest.suffix == ".safetensors":
        raise BadRequest(f"both {source} and {dest} must end in .safetensors; a pickle cannot be converted.", "source")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{dest.name}-", dir=dest.absolute().parent) as unfinished:
            part = Path(unfinished) / dest.name
            if source.is_file():
                _convert_file(source, part, dtype)
            else:
                _convert_folder(source, part, dtype)
            part.rename(dest)
    except OSError as error:
        raise BadRequest(f"{dest} cannot be written ({error.strerror or error}).", "dest") from None
    return dest


def _convert_folder(source: Path, dest: Path, dtype: str) -> None:
    files = sorted(path for path in source.rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    pickles = [path for path in files if path.suffix in PICKLES]
    folders = {path.parent for path in weights}
    for path in pickles:
        if path.parent not in folders:
            raise BadWeights(f"{path} is a pickle; only .safetensors files are converted.")
    if not weights:
        raise BadWeights(f"{source} holds no .safetensors file.")
    for path in files:
        to = dest / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        if path in weights:
            plain = VARIANT.sub("", path.name)
            if plain == path.name or not path.with_name(plain).exists():
                _convert_file(path, to.with_name(plain), dtype)
        elif path.name.endswith(".safetensors.index.json"):
            continue  # of shards, whose sizes are known when they are written
        elif path not in pickles:
            shutil.copyfile(path, to)
    for path in files:
        if path.name.endswith(".safetensors.index.json"):
            _write_index(path, dest / path.relative_to(source))


def _convert_file(source: Path, dest: Path, dtype: str) -> None:
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    number, tensors = getattr(torch, dtype), {}
    try:
        with safe_open(source, "pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118 - a safe_open is no mapping
                tensor = file.get_tensor(name)
                tensors[name] = tensor.to(number) if tensor.is_floating_point() else tensor
                if tensor.is_floating_point() and not tensors[name].isfinite().all() and tensor.isfinite().all():
                    raise BadWeights(f"{source}: values of {name!r} are too large for {dtype}; use bfloat16.")
    except SafetensorError as error:
        raise BadWeights(f"{source} is damaged or no safetensors file ({error}).") from None
    try:
        save_file(tensors, dest, metadata)
    except SafetensorError as error:  # it says so instead of an OSError
        raise BadRequest(f"{dest.name} cannot be written ({error}).", "dest") from None


def _write_index(source: Path, dest: Path) -> None:
    """Which tensor is in which shard stays; how many bytes they are does not."""
    try:
        index: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        shards = set(index["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        raise BadWeights(f"{source} does not say which tensor is in which file.") from None
    missing = sorted(name for name in shards if not (dest.parent / name).is_file())
    if missing:
        raise BadWeights(f"{source} names {missing[0]}, which is not there.")
    index["metadata"] = {"total_size": sum((dest.parent / name).stat().st_size for name in shards)}
    dest.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
