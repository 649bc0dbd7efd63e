"""Drawings of faces: InstantID's five-keypoint control image, and the picture that `idgen faces --draw` saves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from idgen.errors import BadRequest

if TYPE_CHECKING:
    from idgen.faces import Face

# Left eye, right eye, nose, left and right corner of the mouth (left and right as seen in the picture).
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
_LIMBS = ((0, 2), (1, 2), (3, 2), (4, 2))
_STICK_WIDTH = 4
_RADIUS = 10
_LEGIBLE = 320  # pixels of the shorter side on which a label of 11 pixels leaves the face free
_FARTHEST = 1_000_000.0  # pixels; beyond it OpenCV's fixed-point coordinates would overflow


def draw_keypoints(size: tuple[int, int], keypoints: np.ndarray | Sequence[Sequence[float]]) -> Image.Image:
    """Draw the control image of InstantID's IdentityNet: an RGB image of `size` (width, height) on black.

    keypoints: [5, 2] pixels, x then y; they may lie outside the picture.

    Pixel-equal to `draw_kps` of InstantID's pipeline_stable_diffusion_xl_instantid.py: four sticks to the nose, dimmed
    to 60 %, then five discs in full colour. The arithmetic stays in the dtype that is handed in, as it does there.

    Raises `BadRequest` for points that are not five finite pairs or a size that is not positive.
    """
    import cv2

    points = _checked(keypoints)
    width, height = _checked_size(size)
    canvas = np.zeros((height, width, 3), np.float64)
    for first, second in _LIMBS:
        x, y = points[[first, second]].T
        length = ((x[0] - x[1]) ** 2 + (y[0] - y[1]) ** 2) ** 0.5
        angle = math.degrees(math.atan2(y[0] - y[1], x[0] - x[1]))
        centre = (int(np.mean(x)), int(np.mean(y)))
        axes = (int(length / 2), _STICK_WIDTH)
        stick = np.asarray(cv2.ellipse2Poly(centre, axes, int(angle), 0, 360, 1))
        cv2.fillConvexPoly(canvas, stick, COLOURS[first])
    picture = (canvas * 0.6).astype(np.uint8)
    for (x, y), colour in zip(points, COLOURS):
        cv2.circle(picture, (int(x), int(y)), _RADIUS, colour, -1)
    return Image.fromarray(picture)


def draw_faces(photo: Image.Image, faces: Sequence[Face]) -> Image.Image:
    """Return an RGB copy of `photo` with each face's box, keypoints, index and score drawn on it.

    Lines and letters grow with the photo; one with a side below 320 pixels is enlarged by a whole factor first. So
    they can be read on a thumbnail and on a poster alike.
    """
    zoom = -(-_LEGIBLE // min(photo.size)) if max(photo.size) < 4 * _LEGIBLE else 1
    picture = photo.convert("RGB").resize((photo.width * zoom, photo.height * zoom), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    shorter = min(picture.size)
    line = max(1, round(shorter / 200))
    font = ImageFont.load_default(size=max(10, round(shorter / 28)))
    for index, face in enumerate(faces):
        x1, y1, x2, y2 = (float(value) * zoom for value in face.box)
        draw.rectangle((x1, y1, x2, y2), outline="black", width=line + 2)  # a dark rim shows up on light walls
        draw.rectangle((x1, y1, x2, y2), outline="lime", width=line)
        radius = max(1.0, min(2.0 * line, (x2 - x1) / 16))
        for (x, y), colour in zip((face.keypoints * zoom).tolist(), COLOURS):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline="black")
        label = f"{index}: {face.score:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
        wide, tall = right - left + 2 * line, bottom - top + 2 * line
        x = min(max(0.0, x1), max(0.0, picture.width - wide))  # keep the label inside the picture
        y = y1 - tall if y1 >= tall else min(max(0.0, y1), max(0.0, picture.height - tall))
        draw.rectangle((x, y, x + wide, y + tall), fill="black")
        draw.text((x + line - left, y + line - top), label, fill="lime", font=font)
    return picture


def _checked(keypoints: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    try:
        points = np.asarray(keypoints)
    except ValueError as error:  # ragged lists
        raise BadRequest(f"keypoints must be 5 pairs of x and y ({error}).", field="keypoints") from error
    if points.shape != (5, 2) or points.dtype.kind not in "fiu":
        raise BadRequest(f"keypoints must be 5 pairs of numbers, not {points.dtype} {points.shape}.", field="keypoints")
    if not np.isfinite(points).all() or float(np.abs(points.astype(np.float64)).max()) > _FARTHEST:
        raise BadRequest("keypoints must be finite pixel positions within a million of the photo.", field="keypoints")
    return points.astype(np.int64) if points.dtype.kind in "iu" else points


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    width, height = (int(side) for side in size)
    if not (1 <= width <= 32_000 and 1 <= height <= 32_000):
        raise BadRequest(f"a drawing of {width} x {height} cannot be made; sides go from 1 to 32,000.", field="size")
    return width, height
