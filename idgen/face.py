"""A face that was found in a photo, and how one of several is picked."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from idgen.alignment import aligned_crop
from idgen.detection import centre
from idgen.errors import BadRequest, NoFaceFound

Pick: TypeAlias = "Literal['largest'] | int | tuple[float, float]"

CROP_SIZES = (112, 224, 256)


@dataclass(eq=False)
class Face:
    """One face in a photo.

    box: [4] float32 pixels: left, top, right, bottom; may reach beyond the photo.
    keypoints: [5, 2] float32 pixels, x then y: left eye, right eye, nose, left and right corner of the mouth, as seen.
    score: the detector's confidence, 0..1.
    embedding: [512] float32, the recogniser's raw feature.
    photo: the upright RGB photo, from which crops are cut.
    """

    box: np.ndarray
    keypoints: np.ndarray
    score: float
    embedding: np.ndarray
    photo: Image.Image

    @property
    def normed(self) -> np.ndarray:
        """[512] float32: the embedding divided by its length."""
        return self.embedding / np.linalg.norm(self.embedding)

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        return float((self.box[2] - self.box[0]) * (self.box[3] - self.box[1]))

    def crop(self, size: int = 112) -> Image.Image:
        """Return the aligned RGB crop of `size` x `size` pixels, black where it reaches beyond the photo.

        Geometry of insightface's `norm_crop`: 112 and 224 fill the picture with ArcFace's five-point template, 256
        shows 14 % more (the template of 128). 112 is what recognisers see; FaceID-Plus uses 224 (SD1.5), 256 (SDXL).
        Raises `BadRequest` for another size.
        """
        if size not in CROP_SIZES:
            raise BadRequest(f"crop size {size}: it is one of {CROP_SIZES}.", field="size")
        return Image.fromarray(aligned_crop(np.asarray(self.photo), self.keypoints, size))


def checked_pick(pick: Pick) -> int | tuple[float, float]:
    """Return an index or a point; the largest face is the first."""
    if isinstance(pick, str):
        if pick == "largest":
            return 0
    elif not isinstance(pick, bool):
        try:
            if isinstance(pick, tuple | list | np.ndarray):
                x, y = (float(value) for value in pick)
                if np.isfinite([x, y]).all():
                    return x, y
            elif (index := operator.index(pick)) >= 0:
                return index
        except (TypeError, ValueError):
            pass
    raise BadRequest(f'pick {pick!r}: it is "largest", an index from 0, or a point (x, y) in pixels.', field="pick")


def picked(faces: list[Face], wanted: int | tuple[float, float], name: str) -> Face:
    """Return the face of that index, or the one at that point."""
    if isinstance(wanted, int):
        if wanted < len(faces):
            return faces[wanted]
        raise NoFaceFound(f"{name} has {len(faces)} face(s), numbered from 0: there is no face {wanted}.")
    x, y = wanted
    hit = [face for face in faces if face.box[0] <= x <= face.box[2] and face.box[1] <= y <= face.box[3]]
    if not hit:
        where = "; ".join("({:.0f}, {:.0f})".format(*centre(face.box)) for face in faces)
        raise NoFaceFound(f"{name} has no face at ({x:g}, {y:g}). Faces have their centres at {where}.")
    return min(hit, key=lambda face: float(np.hypot(*(centre(face.box) - (x, y)))))
