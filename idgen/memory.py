"""What portraits were made from, kept on this machine so that they can be made again.

A saved portrait names its inputs by hash only: neither a face embedding nor a photo travels inside a picture that is
shared. The inputs themselves lie in idgen's data folder.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from idgen.errors import BadImage, BadRequest
from idgen.identity import Identity
from idgen.weights.store import Store

log = logging.getLogger("idgen")


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
    """Keep an input and return its name, ``<sha256>.<kind>``. Keeping it twice costs nothing.

    Where it cannot be kept, on a full disk or in a folder that may not be written, a warning says what that costs: a
    portrait is never lost for it.
    """
    if isinstance(thing, Identity):
        data, kind = thing.to_bytes(), "safetensors"
    elif isinstance(thing, np.ndarray):
        data, kind = np.ascontiguousarray(thing, dtype="<f4").tobytes(), "points"
    else:
        rgb = thing.convert("RGB")
        data, kind = f"{rgb.width}x{rgb.height}".encode() + rgb.tobytes(), "png"
    name = f"{hashlib.sha256(data).hexdigest()}.{kind}"
    if _keeping.get():
        try:
            _keep(_folder() / name, thing if isinstance(thing, Image.Image) else data)
        except OSError as error:
            _warn(_folder(), error.strerror or str(error))
    return name


@lru_cache(maxsize=8)
def _warn(folder: Path, reason: str) -> None:
    """Once is enough: a batch has thousands of portraits."""
    log.warning(
        "the photo or identity cannot be kept in %s (%s): to render this portrait again with --like, give it again. "
        "IDGEN_HOME names another folder.",
        folder,
        reason,
    )


def _keep(path: Path, content: Image.Image | bytes) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, for another process may be keeping the same photo at this moment.
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content.save(temporary, "PNG")
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


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
