"""The arithmetic of embeddings: their direction, the way between two, and one out of several photos of a person."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from idgen.errors import BadRequest
from idgen.images import describe

if TYPE_CHECKING:
    from idgen.faces import Face

WIDTH = 512

# Faces of different people have ArcFace cosines around 0 +- 0.1, photos of one person mostly above 0.4, hard ones
# (profile, decades apart) above 0.2. Lower than a verification threshold, since only strangers should be left out.
SAME_PERSON = 0.2


def direction(embedding: np.ndarray) -> np.ndarray:
    """Return the unit vector [512] float64 of an embedding [512], of [k, 512] that of the mean of its directions."""
    rows = embedding.reshape(-1, WIDTH).astype(np.float64)
    mean = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(0)
    length = np.linalg.norm(mean)
    return mean / length if length > 1e-12 else rows[0] / np.linalg.norm(rows[0])


def slerp(start: np.ndarray, end: np.ndarray, t: float) -> np.ndarray:
    """Return the vector at `t` (0..1) between two vectors: on the great circle in direction, linearly in length.

    Shoemake, "Animating Rotation with Quaternion Curves" (SIGGRAPH 1985), written with the part of `end` at right
    angles to `start`, which stays exact when the two are nearly parallel.
    """
    start, end = start.astype(np.float64), end.astype(np.float64)
    from_length, to_length = np.linalg.norm(start), np.linalg.norm(end)
    a, b = start / from_length, end / to_length
    angle = 2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))
    across = b - (a @ b) * a
    if np.linalg.norm(across) < 1e-9:  # parallel: the axis does not matter; opposite: any one will do
        across = np.eye(len(a))[np.argmin(np.abs(a))]
        across = across - (a @ across) * a
    across /= np.linalg.norm(across)
    unit = np.cos(t * angle) * a + np.sin(t * angle) * across
    return unit * ((1 - t) * from_length + t * to_length)


def robust_mean(normed: np.ndarray) -> np.ndarray:
    """Return the direction, [512] float64 of length 1, nearest to the unit vectors `normed` [n, 512].

    The geometric median on the sphere (Weiszfeld's iteration, each step projected back): m = sum w_i n_i / |...| with
    w_i = 1 / max(|n_i - m|, 0.1). Unlike the mean it is moved little by one poor photo, since a vector's pull does not
    grow with its distance. The floor keeps two near-duplicates from drawing m onto themselves.
    """
    mean = direction(normed)
    for _ in range(50):
        weights = 1 / np.maximum(np.linalg.norm(normed - mean, axis=1), 0.1)
        step = direction_of_sum(weights[:, None] * normed, mean)
        if np.abs(step - mean).max() < 1e-10:
            break
        mean = step
    return mean


def direction_of_sum(vectors: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Return the direction of the sum of `vectors` [n, 512], or `otherwise` when they cancel."""
    total = vectors.sum(0)
    length = np.linalg.norm(total)
    return total / length if length > 1e-12 else otherwise


def combine(faces: Sequence[Face], sources: Sequence[object]) -> tuple[np.ndarray, Face]:
    """Return one raw embedding [512] float32 for the person in all `faces`, and the best face.

    One face: its embedding, unchanged. Several: faces with a cosine of `SAME_PERSON` or more to the face that agrees
    with the most others form the majority; the rest are left out, each named in a warning. The result has the
    direction `robust_mean` of the majority and the mean of their raw lengths. The order of the photos has no influence.

    sources: the photos, for messages. Raises `BadRequest` when no majority (more than half) agrees.
    """
    # Sorted by content: sums and ties then come out bit-equal for any order of the photos.
    order = sorted(range(len(faces)), key=lambda index: (faces[index].embedding.tobytes(), faces[index].box.tobytes()))
    raw = np.stack([faces[index].embedding for index in order]).astype(np.float64)
    lengths = np.linalg.norm(raw, axis=1)
    if lengths.min() < 1e-12:
        raise BadRequest("the recogniser returned an embedding of zeros: it is nobody's face.", field="photos")
    cosines = (raw / lengths[:, None]) @ (raw / lengths[:, None]).T
    alike = cosines >= SAME_PERSON
    centre = max(range(len(order)), key=lambda row: (alike[row].sum(), cosines[row].sum()))
    kept = np.flatnonzero(alike[centre])
    if len(order) > 1 and 2 * len(kept) <= len(order):
        pairs = np.argwhere(np.triu(~alike, 1))
        one, other = pairs[0]
        raise BadRequest(
            f"these photos show different people and none has the majority: {describe(sources[order[one]])} and "
            f"{describe(sources[order[other]])} have a cosine of {cosines[one, other]:.2f}, the same person has "
            f"{SAME_PERSON} or more. Hand in photos of one person, or pick the face in each.",
            field="photos",
        )
    mean = robust_mean(raw[kept] / lengths[kept, None])
    for row in np.flatnonzero(~alike[centre]):
        warnings.warn(
            f"{describe(sources[order[row]])}: its face disagrees with the others (cosine "
            f"{raw[row] @ mean / lengths[row]:.2f}; the same person has {SAME_PERSON} or more). It is left out.",
            UserWarning,
            stacklevel=3,
        )
    best = max(kept, key=lambda row: _quality(faces[order[row]]))
    if len(order) == 1:
        return faces[0].embedding, faces[0]
    return (mean * lengths[kept].mean()).astype(np.float32), faces[order[best]]


def _quality(face: Face) -> float:
    """Higher for surer and larger faces; beyond the 256 pixels of a crop size no longer counts."""
    return face.score * min(1.0, face.area**0.5 / 256)
