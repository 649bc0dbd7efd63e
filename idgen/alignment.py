"""Aligned crops: a face turned, scaled and shifted so that its five keypoints lie where recognisers expect them.

The same geometry as insightface's `face_align.norm_crop`. It is not called itself because it goes through a method that
scikit-image has deprecated (a warning for every crop) and will remove.
"""

from __future__ import annotations

import numpy as np

# ArcFace's template for 112 x 112 pixels (insightface/utils/face_align.py, `arcface_dst`): eyes, nose, mouth corners.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float64
)


def alignment(keypoints: np.ndarray, size: int) -> np.ndarray:
    """Return the matrix [2, 3] that carries `keypoints` ([5, 2] pixels) to the template of a crop of `size` pixels.

    Sizes that are multiples of 112 fill the crop with the template; other multiples of 128 leave 8 of 128 more on the
    left and right and 16 of 128 below (`estimate_norm` of insightface). This is the least-squares similarity without
    reflection (Umeyama 1991), with points as complex numbers: w = a z + b, where for z and w less their means
    a = sum conj(z) w / sum |z|^2, and b = mean w - a mean z.
    """
    unit, margin = (112, 0.0) if size % 112 == 0 else (128, 8.0)
    target = (TEMPLATE + np.array([margin, 0.0])) * (size / unit)
    z, w = (points.astype(np.float64) @ (1, 1j) for points in (keypoints, target))
    centred = z - z.mean()
    a = (centred.conj() @ (w - w.mean())) / (centred.conj() @ centred).real
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def aligned_crop(pixels: np.ndarray, keypoints: np.ndarray, size: int) -> np.ndarray:
    """Return the crop [size, size, 3] of `pixels` [H, W, 3], bilinear, black where it reaches beyond the photo."""
    import cv2

    return np.asarray(cv2.warpAffine(pixels, alignment(keypoints, size), (size, size), borderValue=(0.0,)))
