"""Readers of the public adapter files: ``.bin`` pickles (never executed) and ``.safetensors``.

Layout, shared by IP-Adapter and InstantID files: ``{"image_proj": {...}, "ip_adapter": {...}}``, flattened with dots in
safetensors. ``ip_adapter`` keys are ``{i}.to_k_ip.weight``, ``{i}.to_v_ip.weight`` and, in FaceID files,
``{i}.to_{q,k,v,out}_lora.{down,up}.weight``; ``i`` counts as :func:`idgen.adapters.attention.attention_layers` does.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idgen.adapters.attention import LoraWeights, StreamWeights
from idgen.adapters.projections import build_projection
from idgen.errors import BadWeights, WeightsMissing

_STREAM_KEY = re.compile(r"(\d+)\.to_([kv])_ip\.weight")
_LORA_KEY = re.compile(r"(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Read a flat table of tensors from a ``.safetensors`` file or a torch pickle, on the CPU, in the file's dtype.

    Pickles are read with ``weights_only=True``: a file that tries to run code is refused, not run.

    Raises:
        WeightsMissing: there is no such file.
        BadWeights: it is truncated, no weight file, carries code, or holds something other than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsMissing(f"there is no weight file {path}; check the path.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        # Mapped where the format allows it: 1.7 GB of InstantID then take no memory on their way to the GPU.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise BadWeights(
            f"{path} is a pickle that holds more than tensors and was not run ({reason}). "
            "Use the publisher's own file, or its .safetensors version."
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, struct.error) as error:
        raise BadWeights(f"{path} is damaged or not a weight file ({error}). Download it again.") from None
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise BadWeights(f"{path} is damaged or no safetensors file ({error}). Download it again.") from None
        raise BadWeights(f"{path} cannot be read as a weight file ({type(error).__name__}: {error}).") from None
    return _flatten(loaded, path)


def _flatten(table: Any, path: Path, prefix: str = "") -> dict[str, Tensor]:
    if not isinstance(table, Mapping):
        raise BadWeights(f"{path} holds a {type(table).__name__} at {prefix or 'its top'!r} where tensors belong.")
    flat: dict[str, Tensor] = {}
    for key, value in table.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        else:
            flat.update(_flatten(value, path, f"{prefix}{key}."))
    return flat


@dataclass(eq=False)
class AdapterFile:
    """An adapter file taken apart: projection, token-stream weights and, in FaceID files, the LoRA."""

    projection: nn.Module
    stream: StreamWeights
    lora: LoraWeights | None

    def to(self, device: Any, dtype: Any) -> AdapterFile:
        """Move everything; the projection is moved in place."""
        lora = self.lora.to(device, dtype) if self.lora is not None else None
        return AdapterFile(self.projection.to(device=device, dtype=dtype), self.stream.to(device, dtype), lora)


def read_adapter(path: Path | str) -> AdapterFile:
    """Read an IP-Adapter, FaceID or InstantID file.

    Raises:
        WeightsMissing, BadWeights: as :func:`read_tensors`; also when a key is missing, unexpected or misshapen.
    """
    tensors = read_tensors(path)
    projection: dict[str, Tensor] = {}
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    lora: dict[int, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.isnan().any():
            raise BadWeights(f"{path}: the tensor {name!r} is not made of finite floating-point numbers.")
        part, _, rest = name.partition(".")
        if part == "image_proj":
            projection[rest] = tensor
        elif part == "ip_adapter" and (match := _STREAM_KEY.fullmatch(rest)):
            (keys if match[2] == "k" else values)[int(match[1])] = tensor
        elif part == "ip_adapter" and (match := _LORA_KEY.fullmatch(rest)):
            lora.setdefault(int(match[1]), {}).setdefault(match[2], {})[match[3]] = tensor
        else:
            raise BadWeights(
                f"{path} is not an IP-Adapter, FaceID or InstantID file: its key {name!r} does not belong in one."
            )
    if not projection or not keys:
        missing = "image_proj" if not projection else "ip_adapter.1.to_k_ip.weight"
        raise BadWeights(f"{path} is not an IP-Adapter, FaceID or InstantID file: it lacks {missing!r}.")
    for number in sorted(set(keys) ^ set(values)):
        letter = "v" if number in keys else "k"
        raise BadWeights(f"{path} lacks the key 'ip_adapter.{number}.to_{letter}_ip.weight'.")
    return AdapterFile(
        build_projection(projection, str(path)),
        StreamWeights(keys, values),
        _lora_weights(lora, path) if lora else None,
    )


def _lora_weights(table: dict[int, dict[str, dict[str, Tensor]]], path: Path | str) -> LoraWeights:
    layers: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    for number, names in table.items():
        for name, pair in names.items():
            for part in ("down", "up"):
                if part not in pair:
                    raise BadWeights(f"{path} lacks the key 'ip_adapter.{number}.to_{name}_lora.{part}.weight'.")
            if pair["down"].shape[0] != pair["up"].shape[1]:
                raise BadWeights(f"{path}: the ranks of 'ip_adapter.{number}.to_{name}_lora' disagree.")
            layers.setdefault(number, {})[name] = (pair["down"], pair["up"])
    return LoraWeights(layers)
