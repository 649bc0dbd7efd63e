"""What an identity's parts must be. Each check returns the clean value or raises `BadRequest` naming the field."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from idgen.embeddings import WIDTH
from idgen.errors import BadRequest
from idgen.images import open_photo


def frozen(array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """Return a read-only copy."""
    copy = np.array(array, dtype=dtype, order="C")
    copy.flags.writeable = False
    return copy


def numbers(value: Any, field: str) -> np.ndarray:
    """Return any sequence of finite numbers as float32."""
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{array.dtype} values")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise BadRequest(f"{field} must be an array of numbers ({error}).", field=field) from error
    if not np.isfinite(array).all():
        raise BadRequest(f"{field} has values that are NaN or infinite.", field=field)
    return array


def name(name: Any) -> str:
    """Return a recogniser's name that is text and not empty."""
    if not isinstance(name, str) or not name:
        raise BadRequest(f"a recogniser's name is text, not {name!r}.", field="recogniser")
    return name


def embedding(value: Any, name: str) -> np.ndarray:
    """Return a feature [512] or [k, 512] as read-only float32, no row of which is zero."""
    array = numbers(value, "embedding")
    if array.ndim not in (1, 2) or array.shape[-1] != WIDTH or array.size == 0:
        raise BadRequest(f"embedding {name!r} has the shape {array.shape}, not [512] or [k, 512].", field="embedding")
    lengths = np.linalg.norm(array.reshape(-1, WIDTH).astype(np.float64), axis=1)
    if lengths.min() < 1e-12 or lengths.max() > 1e30:
        raise BadRequest(f"embedding {name!r} is zero or too large: it is nobody's face.", field="embedding")
    return frozen(array, np.float32)


def keypoints(value: Any) -> np.ndarray:
    """Return [5, 2] points, read-only: float32 stays so, everything else becomes float64."""
    array = numbers(value, "keypoints")
    if array.shape != (5, 2):
        raise BadRequest(f"keypoints have the shape {array.shape}, not [5, 2].", field="keypoints")
    # Drawing truncates to whole pixels and degrees, so rounding points to float32 could move a stick.
    return frozen(np.asarray(value), np.float32 if np.asarray(value).dtype == np.float32 else np.float64)


def size(value: Any) -> tuple[int, int]:
    """Return (width, height) as positive integers."""
    try:
        width, height = (operator.index(side) for side in value)
    except (TypeError, ValueError) as error:
        raise BadRequest(f"keypoints_size is (width, height), not {value!r}.", field="keypoints_size") from error
    if min(width, height) < 1:
        raise BadRequest(f"keypoints_size {width} x {height} must be positive.", field="keypoints_size")
    return width, height


def share(t: Any) -> float:
    """Return a number within 0..1."""
    try:
        share = float(t)
    except (TypeError, ValueError) as error:
        raise BadRequest(f"t must be a number within 0..1, not {t!r}.", field="t") from error
    if not 0 <= share <= 1:
        raise BadRequest(f"t is {share:g}; it must lie within 0..1.", field="t")
    return share


def crop(value: Any) -> np.ndarray:
    """Return a picture as read-only [H, W, 3] uint8; not only squares, since reference crops come in any shape."""
    return frozen(np.asarray(open_photo(value)), np.uint8)
