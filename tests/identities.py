"""People of random numbers: embeddings, keypoints and crops without a photo."""

from __future__ import annotations

import numpy as np

from idgen.identity import Identity

POINTS = [[76.5, 92.2], [147.4, 90.8], [112.1, 131.7], [81.9, 168.3], [142.6, 167.0]]


def vector(seed: int, length: float = 20.0) -> np.ndarray:
    """A raw embedding [512] in a random direction."""
    values = np.random.default_rng(seed).normal(size=512)
    return (values / np.linalg.norm(values) * length).astype(np.float32)


def whole(seed: int = 0) -> Identity:
    """Somebody of whom everything is known, by two recognisers."""
    pixels = np.random.default_rng(seed).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    embeddings = {"glintr100": vector(seed), "arcface": np.stack([vector(seed + 1), vector(seed + 2)])}
    return Identity(embeddings, POINTS, pixels, name="Ada Ω", keypoints_size=(640, 480))
