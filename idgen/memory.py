"""What portraits were made from, kept on this machine so that they can be made again.

A saved portrait names its inputs by hash only: neither a face embedding nor a photo travels inside a picture that is
shared. The inputs themselves lie in idgen's data folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from idgen.errors import BadImage, BadRequest
from idgen.identity import Identity
from idgen.weights.store import Store


def _folder() -> Path:
    return Store().root / "inputs"


_keeping: ContextVar[bool] = ContextVar("keeping", default=True)


@contextmanager
def forgetting() -> Iterator[None]:
    """Within it inputs are named but never written: a server does not collect its visitors' faces."""
    token = _keeping.set(False)
    try:
        yield
    finally:
        _keeping.reset(token)


def remember(thing: Identity | Image.Image | np.ndarray) -> str:
    """Keep an input and return its name, ``<sha256>.<kind>``. Keeping it twice costs nothing."""
    folder = _folder()
    if _keeping.get():
        folder.mkdir(parents=True, exist_ok=True)
    if isinstance(thing, Identity):
        if not _keeping.get():
            return f"{hashlib.sha256(thing.to_bytes()).hexdigest()}.safetensors"
        return _remember_identity(thing, folder)
    if isinstance(thing, np.ndarray):
        points = np.ascontiguousarray(thing, dtype="<f4")
        data, kind = points.tobytes(), "points"
    else:
        rgb = thing.convert("RGB")
        data, kind = f"{rgb.width}x{rgb.height}".encode() + rgb.tobytes(), "png"
    path = folder / f"{hashlib.sha256(data).hexdigest()}.{kind}"
    if _keeping.get() and not path.exists():
        temporary = path.with_name(f".{path.name}.part")
        if kind == "png":
            thing.save(temporary, "PNG")  # type: ignore[union-attr]
        else:
            temporary.write_bytes(data)
        temporary.replace(path)
    return path.name


def _remember_identity(identity: Identity, folder: Path) -> str:
    temporary = folder / f".{os.getpid()}-{id(identity)}.part.safetensors"
    try:
        identity.save(temporary)
        name = f"{hashlib.sha256(temporary.read_bytes()).hexdigest()}.safetensors"
        temporary.replace(folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    return name


def recall(name: str) -> Any:
    """An input kept before.

    Raises:
        BadRequest: it is not on this machine.
    """
    path = _folder() / Path(name).name
    if not path.is_file():
        raise BadRequest(
            "the photo or identity that this portrait was made from is not on this machine; give it again.", "who"
        )
    if path.suffix == ".safetensors":
        return Identity.load(path)
    if path.suffix == ".points":
        return np.frombuffer(path.read_bytes(), dtype="<f4").reshape(-1, 2).copy()
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise BadImage(f"{path} is damaged ({error}); give the photo again.") from None
