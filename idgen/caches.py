"""What is kept from one request to the next: bounded by memory, keyed by content, shared by threads."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor, nn

from idgen.images import content_hash

T = TypeVar("T")


class TensorCache:
    """Tensors by key; the ones that were not asked for longest leave first. May be used from any thread."""

    def __init__(self, limit: int = 64 * 2**20) -> None:
        """limit: bytes of tensors kept in all. What is larger by itself is made and not kept."""
        self.limit = limit
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is kept under ``key``, or what ``make`` returns: a tensor, or a tuple of tensors and ``None``.

        Callers share it, so nobody may change it in place. Two threads that ask for the same at the same time may
        both make it; they get equal values.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        value = make()
        parts = value if isinstance(value, tuple) else (value,)
        size = sum(part.nbytes for part in parts if isinstance(part, Tensor))
        with self._lock:
            if key not in self._kept and size <= self.limit:
                self._kept[key] = value, size
                self._bytes += size
                while self._bytes > self.limit:
                    _, (_, freed) = self._kept.popitem(last=False)
                    self._bytes -= freed
        return value

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors kept now."""
        return self._bytes


def content_key(*parts: Image.Image | np.ndarray) -> str:
    """A hash of arrays (dtype, shape and values) and pictures (size and pixels), in their order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype} {part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        else:
            digest.update(content_hash(part).encode())
    return digest.hexdigest()


def weights_state(*modules: nn.Module) -> int:
    """A number that changes when a parameter is written to, moved or replaced: what was made from it is then stale.

    torch counts writes to a tensor in ``_version``, which costs no look at the values.
    """
    return hash(tuple((p.data_ptr(), p._version, p.dtype) for module in modules for p in module.parameters()))
