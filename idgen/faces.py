"""Faces: from a photo to boxes, keypoints, embeddings and aligned crops, with insightface's models.

The detector comes from a model-pack folder, the recogniser from an explicit file (see `idgen.facepacks`). A photo in
which no face is found is an error that says what was tried, never a face of nobody.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from idgen import facepacks
from idgen.alignment import aligned_crop
from idgen.detection import Detection, Detector
from idgen.errors import BadImage, BadRequest, BadWeights, NoFaceFound
from idgen.face import CROP_SIZES, Face, Pick, checked_pick, picked
from idgen.images import PhotoSource, content_hash, describe, open_photo

TOGETHER = 16
"""Photos looked at in one go, which all are in memory, and crops that the recogniser sees in one run at most."""
THREADS = 4
"""Photos looked at at the same time: onnxruntime lets other threads run, and each look uses several cores itself."""


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
        detection_size: pixels of the side to which a photo is scaled for the first look, a multiple of 32. If None
            640, or less for photos that a pack does not want enlarged so much (see `idgen.facepacks.enlargement`).
            A detector with a fixed input keeps its own.
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
        self.detector = Detector(
            scrfd, str(self.pack), detection_size, None if detection_size else facepacks.enlargement(self.pack)
        )
        self._takes_many = not isinstance(self._model.session.get_inputs()[0].shape[0], int)
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
        wanted = checked_pick(pick)
        return picked(self.faces(photo), wanted, describe(photo))

    def extract_many(self, photos: Iterable[PhotoSource]) -> Iterator[list[Face] | BadImage | NoFaceFound]:
        """Yield for each photo, in order, what `faces` returns for it, or the `BadImage` or `NoFaceFound` it raises.

        Faster than photo by photo: several photos are decoded and searched at the same time, and the recogniser sees
        many crops in one run where its file has a free batch axis. Detections are equal to `faces`' bit by bit,
        embeddings up to float32 rounding.

        Raises `BadWeights` when a model fails to run.
        """
        waiting = iter(photos)
        with ThreadPoolExecutor(min(THREADS, _cores())) as pool:
            while some := list(islice(waiting, TOGETHER)):
                yield from self._extract_some(some, pool)

    def face_of_each(self, photos: Sequence[PhotoSource], pick: Pick = "largest") -> list[Face]:
        """Return `face(photo, pick)` of each photo, looking at several at once.

        Raises what `face` raises, for the first photo in the list that has it.
        """
        wanted = checked_pick(pick)
        chosen = []
        for photo, found in zip(photos, self.extract_many(photos)):
            if not isinstance(found, list):
                raise found
            chosen.append(picked(found, wanted, describe(photo)))
        return chosen

    def embed(self, crop: Image.Image | np.ndarray) -> np.ndarray:
        """Return the raw embedding, [512] float32, of an aligned RGB crop of `input_size` (112) pixels a side.

        Raises `BadRequest` for another size and `BadWeights` when the recogniser does not return 512 numbers.
        """
        return self._features([self._checked_crop(crop)])[0]

    def embed_many(self, crops: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """Return the raw embeddings, [n, 512] float32, of n aligned crops, each as for `embed`.

        They go through the recogniser together, 16 at most, where its file has a free batch axis; equal to `embed`'s up
        to float32 rounding. Raises as `embed` does.
        """
        checked = [self._checked_crop(crop) for crop in crops]
        step = TOGETHER if self._takes_many else 1
        runs = [self._features(checked[begin : begin + step]) for begin in range(0, len(checked), step)]
        return np.concatenate([np.zeros((0, 512), np.float32), *runs])

    def _checked_crop(self, crop: Image.Image | np.ndarray) -> np.ndarray:
        """Return BGR pixels, as insightface takes them."""
        pixels = np.asarray(crop.convert("RGB") if isinstance(crop, Image.Image) else crop)
        if pixels.shape != (self.input_size, self.input_size, 3) or pixels.dtype != np.uint8:
            raise BadRequest(f"an aligned crop is [{self.input_size}, {self.input_size}, 3] uint8 RGB.", field="crop")
        return np.ascontiguousarray(pixels[:, :, ::-1])

    def _features(self, crops: list[np.ndarray]) -> np.ndarray:
        """One run of the recogniser over BGR crops, [n, 512]."""
        try:
            features = np.asarray(self._model.get_feat(crops))
        except Exception as error:  # onnxruntime's errors share no base class
            if len(crops) == 1:
                raise BadWeights(f"{self.recogniser} fails to run ({error}). Get it again.") from error
            features = np.zeros(0)
        if len(crops) > 1 and features.shape != (len(crops), 512):
            # A batch axis that is free by name only: something behind it was exported for one crop.
            self._takes_many = False
            return np.concatenate([self._features([crop]) for crop in crops])
        if features.shape != (len(crops), 512) or not np.isfinite(features).all():
            raise BadWeights(f"{self.recogniser} returns {features.shape}, not 512 finite numbers: it is no ArcFace.")
        return features.astype(np.float32)

    def _faces(self, photo: Image.Image, name: str) -> list[Face]:
        return self._as_faces(self._remembered(photo), photo, name)

    def _as_faces(self, found: list[_Found], photo: Image.Image, name: str) -> list[Face]:
        if not found:
            raise NoFaceFound(
                f"{name}: no face found, looking {self.detector.tried(*photo.size)}. Use a photo in which the face is "
                "sharp, upright, lit, not covered and seen from the front or the half side."
            )
        return [
            Face(each.box.copy(), each.keypoints.copy(), each.score, each.embedding.copy(), photo) for each in found
        ]

    def _remembered(self, photo: Image.Image) -> list[_Found]:
        """Extract once per content, also when several threads ask for the same photo at the same time."""
        key, future, mine = self._claim(photo)
        if mine:
            try:
                found, crops = self._search(photo)
                future.set_result(_join(found, [self.embed(crop) for crop in crops]))
            except BaseException as error:
                self._give_up(key, future, error)
                raise
        return future.result()

    def _claim(self, photo: Image.Image) -> tuple[str, Future[list[_Found]], bool]:
        """Return the photo's key, where its faces are or will be, and whether it is on the caller to put them there."""
        key = content_hash(photo)
        with self._lock:
            future = self._cache.get(key)
            mine = future is None
            if future is None:
                future = self._cache[key] = Future()
                while len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
        return key, future, mine

    def _give_up(self, key: str, future: Future[list[_Found]], error: BaseException) -> None:
        """Tell those who wait; the next one who asks tries again."""
        with self._lock:
            if self._cache.get(key) is future:
                del self._cache[key]
        future.set_exception(error)

    def _search(self, photo: Image.Image) -> tuple[list[Detection], list[np.ndarray]]:
        """Return the faces and their aligned crops."""
        pixels = np.asarray(photo)
        found = self.detector.detect(pixels)
        return found, [aligned_crop(pixels, each.keypoints, self.input_size) for each in found]

    def _extract_some(
        self, sources: list[PhotoSource], pool: ThreadPoolExecutor
    ) -> Iterator[list[Face] | BadImage | NoFaceFound]:
        claims: list[_Claim] = []

        def look(source: PhotoSource) -> tuple[Image.Image, Future[list[_Found]]] | BadImage:
            try:
                photo = open_photo(source)
            except BadImage as error:
                return error
            key, future, mine = self._claim(photo)
            if mine:
                claims.append(claim := _Claim(key, future))
                claim.found, claim.crops = self._search(photo)
            return photo, future

        looking = []
        try:
            for source in sources:
                looking.append(pool.submit(look, source))
            looks = [future.result() for future in looking]
            features = self.embed_many([crop for claim in claims for crop in claim.crops])
            for claim in claims:
                mine, features = features[: len(claim.crops)], features[len(claim.crops) :]
                claim.future.set_result(_join(claim.found, list(mine)))
        except BaseException as error:
            # Those that still look may claim yet, and what is claimed and never given up is waited for forever.
            for future in looking:
                future.cancel()
            try:
                wait(looking)
            finally:  # also when a second interrupt ends the waiting
                for claim in claims:
                    if not claim.future.done():
                        self._give_up(claim.key, claim.future, error)
            raise
        # Only now what others look at is waited for: all that others may wait for has been done.
        for source, each in zip(sources, looks):
            if isinstance(each, BadImage):
                yield each
                continue
            try:
                yield self._as_faces(each[1].result(), each[0], describe(source))
            except NoFaceFound as error:
                yield error


def _cores() -> int:
    """Cores that this process may use: in a container or under taskset fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(eq=False)
class _Claim:
    """A photo that one call has to look at, on behalf of all who ask for it."""

    key: str
    future: Future[list[_Found]]
    found: list[Detection] = field(default_factory=list)
    crops: list[np.ndarray] = field(default_factory=list)


def _join(found: Iterable[Detection], embeddings: Iterable[np.ndarray]) -> list[_Found]:
    return [_Found(each.box, each.keypoints, each.score, row) for each, row in zip(found, embeddings)]


__all__ = ["CROP_SIZES", "Face", "FaceExtractor", "Pick"]
