"""Is a file what its name says? Told from its first bytes, without loading it.

Files downloaded by hand are often something else: a page that asks to log in, a Git LFS pointer, or half a file.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from idgen.errors import BadWeights

MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit
MAX_JSON = 50_000_000  # bytes; a large tokenizer is a tenth of that


def refuse_mislabelled(path: Path) -> None:
    """Check the beginning of a weight file, and for safetensors that no byte is missing at its end.

    Raises:
        BadWeights: the file is empty, a web page, a Git LFS pointer, damaged JSON, or not a whole safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(256)
    if size == 0:
        raise BadWeights(f"{path} is empty. Download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise BadWeights(
            f"{path} is a Git LFS pointer, not the file itself. Run git lfs pull there, or download it again."
        )
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise BadWeights(
            f"{path} is a web page, not weights: the download met a login or error page. Download it again."
        )
    if path.suffix == ".safetensors":
        _refuse_bad_safetensors(path, size)
    elif path.suffix == ".json":
        try:
            if size > MAX_JSON:
                raise ValueError(f"{size} bytes are too many")
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise BadWeights(f"{path} is not valid JSON ({error}). Download it again.") from None


def _refuse_bad_safetensors(path: Path, size: int) -> None:
    """Layout: header length as little-endian u64, header as JSON, then the tensors' bytes without a gap."""

    def refuse(why: str) -> BadWeights:
        return BadWeights(f"{path} is not a whole safetensors file: {why}. Download it again.")

    if size < 10:
        raise refuse("it is too short")
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise refuse("its header is cut off or missing")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        end = max(ends, default=0)
        if not isinstance(end, int):
            raise TypeError("offsets are not numbers")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise refuse("its header is damaged") from None
    if end != size - 8 - length:
        raise refuse(f"it should be {8 + length + end} bytes and is {size}")
