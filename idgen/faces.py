"""Faces: from a photo to boxes, keypoints, embeddings and aligned crops, with insightface's models.

The detector comes from a model-pack folder, the recogniser from an explicit file (see `idgen.facepacks`). A photo in
which no face is found is an error that says what was tried, never a face of nobody.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from idgen import facepacks
from idgen.alignment import aligned_crop
from idgen.detection import Detector, centre
from idgen.errors import BadRequest, BadWeights, NoFaceFound
from idgen.images import PhotoSource, content_hash, describe, open_photo

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


class _Found(NamedTuple):
    """What is kept of a face in the cache: no pixels."""

    box: np.ndarray
    keypoints: np.ndarray
    score: float
    embedding: np.ndarray


class FaceExtractor:
    """Finds and recognises faces. One extractor may be used from many threads."""

    def __init__(
        self,
        pack: str | Path,
        recogniser: str | Path | None = None,
        *,
        device: str = "auto",
        detection_size: int | None = None,
        cache_size: int = 256,
    ) -> None:
        """Load the models.

        pack: folder of ONNX files; the nested layout `antelopev2/antelopev2/` is understood.
        recogniser: an ArcFace file, anywhere; without it the only one in the pack.
        device: auto, cpu, cuda, cuda:N or mps (see `idgen.facepacks.providers_for`).
        detection_size: pixels of the side to which a photo is scaled for the first look, a multiple of 32; 640 if
            None. A detector with a fixed input keeps its own.
        cache_size: photos whose faces are remembered (by content; a few kB each).

        Raises `WeightsMissing`, `BadWeights` or `BadRequest`.
        """
        if detection_size is not None and (detection_size < 32 or detection_size % 32 or detection_size > 4096):
            raise BadRequest(f"detection_size {detection_size}: a multiple of 32, 32..4096.", field="detection_size")
        if cache_size < 1:
            raise BadRequest(f"cache_size {cache_size}: at least 1.", field="cache_size")
        self.pack = facepacks.find_pack(Path(pack))
        self.recogniser = Path(recogniser) if recogniser else facepacks.find_recogniser(Path(pack), self.pack)
        asked = facepacks.providers_for(device)
        scrfd, self._model = facepacks.load_models(self.pack, self.recogniser, asked)
        facepacks.warn_of_cpu(device, self.providers)
        self._detector = Detector(scrfd, str(self.pack), detection_size)
        self._cache: OrderedDict[str, Future[list[_Found]]] = OrderedDict()
        self._cache_size = cache_size
        self._lock = threading.Lock()
        self.embed(np.zeros((self.input_size, self.input_size, 3), np.uint8))  # a wrong file fails here, not later

    @property
    def providers(self) -> list[str]:
        """onnxruntime's active execution providers, first choice first."""
        return list(self._model.session.get_providers())

    @property
    def recogniser_name(self) -> str:
        """The recogniser's file name without its suffix: the name under which identities keep its embeddings."""
        return self.recogniser.stem

    @property
    def input_size(self) -> int:
        """Side in pixels of the crop that the recogniser sees (112 for every public one)."""
        return int(self._model.input_size[0])

    def faces(self, photo: PhotoSource) -> list[Face]:
        """Return every face in a photo, the largest first.

        Raises `BadImage` for what is no photo and `NoFaceFound`, after all retries, for one without a face.
        """
        return self._faces(open_photo(photo), describe(photo))

    def face(self, photo: PhotoSource, pick: Pick = "largest") -> Face:
        """Return one face: the `"largest"`, the one with that index in `faces()`, or the one at a point (x, y).

        Raises `NoFaceFound` also when that index or point has no face, and `BadRequest` for another `pick`.
        """
        name = describe(photo)
        wanted = _checked_pick(pick)
        faces = self._faces(open_photo(photo), name)
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

    def embed(self, crop: Image.Image | np.ndarray) -> np.ndarray:
        """Return the raw embedding, [512] float32, of an aligned RGB crop of `input_size` (112) pixels a side.

        Raises `BadRequest` for another size and `BadWeights` when the recogniser does not return 512 numbers.
        """
        pixels = np.asarray(crop.convert("RGB") if isinstance(crop, Image.Image) else crop)
        if pixels.shape != (self.input_size, self.input_size, 3) or pixels.dtype != np.uint8:
            raise BadRequest(f"an aligned crop is [{self.input_size}, {self.input_size}, 3] uint8 RGB.", field="crop")
        try:
            feature = np.asarray(self._model.get_feat(np.ascontiguousarray(pixels[:, :, ::-1])))  # insightface: BGR
        except Exception as error:  # onnxruntime's errors share no base class
            raise BadWeights(f"{self.recogniser} fails to run ({error}). Get it again.") from error
        if feature.shape != (1, 512) or not np.isfinite(feature).all():
            raise BadWeights(f"{self.recogniser} returns {feature.shape}, not 512 finite numbers: it is no ArcFace.")
        return feature[0].astype(np.float32)

    def _faces(self, photo: Image.Image, name: str) -> list[Face]:
        found = self._remembered(photo)
        if not found:
            raise NoFaceFound(
                f"{name}: no face found, looking {self._detector.tried(*photo.size)}. Use a photo in which the face is "
                "sharp, upright, lit, not covered and seen from the front or the half side."
            )
        return [
            Face(each.box.copy(), each.keypoints.copy(), each.score, each.embedding.copy(), photo) for each in found
        ]

    def _remembered(self, photo: Image.Image) -> list[_Found]:
        """Extract once per content, also when several threads ask for the same photo at the same time."""
        key = content_hash(photo)
        with self._lock:
            future = self._cache.get(key)
            mine = future is None
            if future is None:
                future = self._cache[key] = Future()
                while len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
        if mine:
            try:
                future.set_result(self._extract(photo))
            except BaseException as error:
                with self._lock:
                    self._cache.pop(key, None)
                future.set_exception(error)
                raise
        return future.result()

    def _extract(self, photo: Image.Image) -> list[_Found]:
        pixels = np.asarray(photo)
        return [
            _Found(
                each.box, each.keypoints, each.score, self.embed(aligned_crop(pixels, each.keypoints, self.input_size))
            )
            for each in self._detector.detect(pixels)
        ]


def _checked_pick(pick: Pick) -> int | tuple[float, float]:
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


__all__ = ["CROP_SIZES", "Face", "FaceExtractor", "Pick"]
