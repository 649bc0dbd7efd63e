"""Detection with retries: where in a photo, and at which size, insightface's detector looks until it finds a face."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from idgen.errors import BadWeights

Region: TypeAlias = "tuple[int, int, int, int]"  # left, top, right, bottom in pixels; may reach beyond the photo

DEFAULT_SIZE = 640  # what InstantID, IP-Adapter-FaceID and Arc2Face ask for
PADDINGS = (0.25, 0.5, 1.0)  # of the photo's longer side, added on every side


class Detection(NamedTuple):
    """A face's box [4] and keypoints [5, 2], float32 pixels of the photo, and the detector's score 0..1."""

    box: np.ndarray
    keypoints: np.ndarray
    score: float


class Detector:
    """insightface's SCRFD, looking again with other sizes, with padding and closer before it gives up."""

    def __init__(self, scrfd: Any, name: str, size: int | None = None, enlarge: float | None = None) -> None:
        """scrfd: insightface's model; name: what to call it in errors; size: of the first look, unless it is fixed;
        enlarge: how many times larger than it is a small photo is first looked at, at most; None: without a limit."""
        self._scrfd = scrfd
        self._name = name
        self._fixed = getattr(scrfd, "static_input_size", None) is not None
        self.size = int(scrfd.input_size[0]) if self._fixed else size or DEFAULT_SIZE
        self.enlarge = None if self._fixed else enlarge

    def detect(self, pixels: np.ndarray) -> list[Detection]:
        """Return the faces in `pixels` ([H, W, 3] uint8 RGB), the largest first, from the first look that finds any.

        Raises `BadWeights` when the model fails to run.
        """
        height, width = pixels.shape[:2]
        for size, regions in self._looks(width, height):
            if found := self._look(pixels, size, regions):
                return sorted(found, key=lambda each: (-_area(each.box), -each.score))
        return []

    def tried(self, width: int, height: int) -> str:
        """Put into words what `detect` tries on a photo of that size."""
        looks = list(self._looks(width, height))
        sizes = ", ".join(dict.fromkeys(str(size) for size, _ in looks))
        paddings = ", ".join(f"{share:.0%}" for share in PADDINGS)
        closer = ", and closer at its quarters" if len(looks[-1][1]) > 1 else ""
        return f"at {sizes} pixels, with black borders of {paddings}{closer}"

    def _looks(self, width: int, height: int) -> Iterator[tuple[int, list[Region]]]:
        """Yield, in order, the size to look with and the regions to look at.

        Smaller sizes find faces that fill the photo, larger ones small faces. A region larger than the photo is the
        padding that tight crops need: detectors are trained on faces with something around them. It is black, as the
        border is that insightface itself adds. A detector of fixed size cannot look closer at all of a photo, so it
        looks at overlapping quarters. Where a pack limits enlarging, a small photo's first look is a smaller one, and
        that of the usual size comes later.
        """
        whole, longer = (0, 0, width, height), max(width, height)
        size = self.size
        if self.enlarge is not None:
            size = min(size, 32 * max(2, -(-int(self.enlarge * longer) // 32)))
        yield size, [whole]
        if not self._fixed and size >= 128:
            yield size // 64 * 32, [whole]
        if size < self.size:
            yield self.size, [whole]
        elif not self._fixed and size < min(longer, 2048):
            yield size * 2, [whole]
        for share in PADDINGS:
            pad = max(1, round(share * longer))
            yield size, [(-pad, -pad, width + pad, height + pad)]
        if self._fixed and longer > size:
            yield size, _quarters(width, height)

    def _look(self, pixels: np.ndarray, size: int, regions: list[Region]) -> list[Detection]:
        """Return the faces in all `regions`, each once, in pixels of the photo."""
        height, width = pixels.shape[:2]
        boxes, points = [np.zeros((0, 5), np.float32)], [np.zeros((0, 5, 2), np.float32)]
        for left, top, right, bottom in regions:
            sides = right - left, bottom - top
            if size * min(sides) < max(sides):
                continue  # so thin that insightface would scale its shorter side to nothing
            picture, shrunk = _cut(pixels, (left, top, right, bottom), 4 * size)
            try:
                found, keypoints = self._scrfd.detect(picture, input_size=(size, size))
            except Exception as error:  # onnxruntime's errors share no base class
                raise BadWeights(f"{self._name}: the detector fails to run ({error}). Get the pack again.") from error
            if len(found) == 0:
                continue
            origin = np.array([left, top], np.float32)
            found[:, :4] = found[:, :4] * shrunk + np.tile(origin, 2)
            # A face cut by the inner edge of a quarter lies whole in the next one.
            edge = 0.02 * min(sides)
            lowest = [left + edge if left > 0 else -np.inf, top + edge if top > 0 else -np.inf]
            highest = [right - edge if right < width else np.inf, bottom - edge if bottom < height else np.inf]
            keep = (found[:, :2] >= lowest).all(1) & (found[:, 2:4] <= highest).all(1)
            boxes.append(found[keep])
            points.append((keypoints * shrunk + origin)[keep])
        box, keypoints = np.concatenate(boxes), np.concatenate(points)
        if len(regions) > 1 and len(box):
            once = self._scrfd.nms(box)
            box, keypoints = box[once], keypoints[once]
        return [
            Detection(each[:4].astype(np.float32), spots.astype(np.float32), float(each[4]))
            for each, spots in zip(box, keypoints)
            if _plausible(each, spots, width, height)
        ]


def centre(box: np.ndarray) -> np.ndarray:
    """Return the centre (x, y) of a box [left, top, right, bottom]."""
    return (box[:2] + box[2:4]) / 2


def _area(box: np.ndarray) -> float:
    return float(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]))


def _cut(pixels: np.ndarray, region: Region, limit: int) -> tuple[np.ndarray, int]:
    """Return a region as BGR for insightface, black beyond the photo, and by how much it was made smaller.

    Only padded regions are: of a photo of 100 megapixels they would take gigabytes. Each `shrunk`-th pixel is kept, so
    long as more than `limit` pixels a side remain; the detector scales down much further itself.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = region
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    inside = pixels[y1:y2, x1:x2, ::-1]
    if (x1, y1, x2, y2) == region:
        return np.ascontiguousarray(inside), 1
    shrunk = max(1, max(right - left, bottom - top) // limit)
    inside = inside[::shrunk, ::shrunk]
    picture = np.zeros((-(-(bottom - top) // shrunk), -(-(right - left) // shrunk), 3), np.uint8)
    y, x = round((y1 - top) / shrunk), round((x1 - left) / shrunk)
    picture[y : y + inside.shape[0], x : x + inside.shape[1]] = inside[: picture.shape[0] - y, : picture.shape[1] - x]
    return picture, shrunk


def _quarters(width: int, height: int) -> list[Region]:
    """Nine regions of half the photo's sides, each overlapping the next by half."""
    wide, tall = -(-width // 2), -(-height // 2)
    lefts, tops = sorted({0, width // 4, width - wide}), sorted({0, height // 4, height - tall})
    return [(left, top, left + wide, top + tall) for top in tops for left in lefts]


def _plausible(box: np.ndarray, keypoints: np.ndarray, width: int, height: int) -> bool:
    """A face has finite keypoints that do not all coincide (a crop needs that), and its centre lies in the photo."""
    if not (np.isfinite(box).all() and np.isfinite(keypoints).all() and np.ptp(keypoints, axis=0).max() > 0):
        return False
    x, y = centre(box)
    return bool(0 <= x <= width and 0 <= y <= height and _area(box) > 0)
