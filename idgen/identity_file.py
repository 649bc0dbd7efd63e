"""Identities on disk: a safetensors file, written in one step and read with distrust."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from idgen.errors import BadImage, BadRequest, BadWeights
from idgen.identity import Identity

_FORMAT = "idgen-identity"
_VERSION = "1"
_LARGEST = 64 * 1024**2  # bytes; a full one has about 200 kB


def to_bytes(identity: Identity) -> bytes:
    """Return the content of an identity's file.

    Tensors: `embedding.<recogniser>`, `keypoints`, `crop` [H, W, 3]; metadata: format, version, recognisers in order
    (JSON), name, keypoints_size (JSON).
    """
    from safetensors.numpy import save

    tensors: dict[str, Any] = {f"embedding.{key}": value for key, value in identity.embeddings.items()}
    metadata = {"format": _FORMAT, "version": _VERSION, "recognisers": json.dumps(list(identity.embeddings))}
    if identity.keypoints is not None:
        tensors["keypoints"] = identity.keypoints
    if identity.crop is not None:
        tensors["crop"] = np.array(identity.crop)
    if identity.name is not None:
        metadata["name"] = identity.name
    if identity.keypoints_size is not None:
        metadata["keypoints_size"] = json.dumps(identity.keypoints_size)
    return _ordered(save(tensors, metadata))


def _ordered(data: bytes) -> bytes:
    """The same file with its header in alphabetical order: safetensors shuffles the metadata, and equal identities
    must be equal bytes, for they are kept by their hash."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors' bytes stay aligned
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def from_bytes(data: bytes, source: str = "this") -> Identity:
    """Return the identity that `to_bytes` made `data` of, bit-equal.

    source: what to call the data in a message. Raises `BadWeights` for any other content.
    """
    from safetensors.numpy import load

    try:
        tensors = load(data)  # checks the header before any of it is used
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__", {})
        if metadata.get("format") != _FORMAT:
            raise BadWeights(f"{source} is a safetensors file but no identity. `idgen identity create` makes one.")
        if metadata.get("version") != _VERSION:
            raise BadWeights(f"{source} has version {metadata.get('version')}; this idgen reads {_VERSION}. Upgrade.")
        return _build(tensors, metadata)
    except BadWeights:
        raise
    except (BadRequest, BadImage) as error:
        raise BadWeights(f"{source} is a damaged identity: {error}") from error
    except Exception as error:  # SafetensorError, and whatever a hostile header brings about
        raise BadWeights(f"{source} is no identity ({error}). `idgen identity create` makes one.") from error


def write(identity: Identity, path: Path) -> None:
    """Write `identity` to `path`: first beside it, then moved over it, so that no reader ever sees half a file.

    Raises `BadRequest` when it cannot be written.
    """
    try:
        data = to_bytes(identity)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # not tempfile's: that would deny others to read
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise BadRequest(
            f"{path} cannot be written ({error}). Choose a file in a folder that exists.", "path"
        ) from error


def read(path: Path) -> Identity:
    """Read what `write` wrote. Raises `BadRequest` without such a file and `BadWeights` for any other content."""
    try:
        if not path.is_file():
            raise BadRequest(f"{path}: there is no such identity file. `idgen identity create` makes one.", "path")
        if path.stat().st_size > _LARGEST:
            raise BadWeights(f"{path} is too large for an identity ({path.stat().st_size:,} bytes).")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} cannot be read ({error}).", "path") from error
    return from_bytes(data, str(path))


def _build(tensors: dict[str, Any], metadata: dict[str, str]) -> Identity:
    names = json.loads(metadata["recognisers"])
    expected = {f"embedding.{name}" for name in names}
    surplus = sorted(set(tensors) - expected - {"keypoints", "crop"})
    missing = sorted(expected - set(tensors))
    if surplus or missing:
        raise BadRequest(f"tensor {(missing or surplus)[0]!r} is {'missing' if missing else 'not expected'}.")
    size = json.loads(metadata["keypoints_size"]) if "keypoints_size" in metadata else None
    return Identity(
        {name: tensors[f"embedding.{name}"] for name in names},
        tensors.get("keypoints"),
        tensors.get("crop"),
        name=metadata.get("name"),
        keypoints_size=size,
    )
