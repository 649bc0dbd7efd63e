"""Identity: what is known of one person, from one or several photos. It can be saved, loaded, mixed and compared."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from idgen.embeddings import WIDTH, combine, direction, slerp
from idgen.errors import BadRequest
from idgen.images import PhotoSource, open_photo

if TYPE_CHECKING:
    from idgen.faces import FaceExtractor, Pick

UNKNOWN = "unknown"  # the recogniser of an embedding that was handed in as a bare array: believed to be the right one


class Identity:
    """One person's embeddings by recogniser, with the keypoints and the aligned crop of the best photo.

    It cannot be changed: `mix`, `joined` and `load` make new ones. Its arrays are read-only.
    """

    def __init__(
        self,
        embedding: np.ndarray | Sequence[float] | Mapping[str, Any],
        keypoints: np.ndarray | Sequence[Sequence[float]] | None = None,
        crop: PhotoSource | None = None,
        *,
        name: str | None = None,
        recogniser: str = UNKNOWN,
        keypoints_size: tuple[int, int] | None = None,
    ) -> None:
        """Build an identity from arrays; see `from_photos` for photos.

        embedding: raw (not normalised) features, [512] or [k, 512] (k features of one person, which InstantID fuses),
            made by the recogniser of that name; or a dict of them by recogniser, the preferred one first.
        keypoints: [5, 2] pixels (x, y) in a photo of `keypoints_size` (width, height); float32 stays so, else float64.
        crop: aligned square crop of the face, best of 256 pixels (`Face.crop(256)`), from which smaller ones are cut.

        Raises `BadRequest` for shapes that differ, values that are not finite and embeddings of zeros, `BadImage` for
        a crop that is no image.
        """
        by_name = embedding if isinstance(embedding, Mapping) else {recogniser: embedding}
        if not by_name:
            raise BadRequest("an identity needs at least one embedding.", field="embedding")
        self._embeddings = {_checked_name(key): _checked_embedding(value, key) for key, value in by_name.items()}
        self.keypoints = None if keypoints is None else _checked_keypoints(keypoints)
        self.keypoints_size = None if keypoints_size is None else _checked_size(keypoints_size)
        self._crop = None if crop is None else _checked_crop(crop)
        if name is not None and not isinstance(name, str):
            raise BadRequest(f"an identity's name is text, not {type(name).__name__}.", field="name")
        self.name = name

    @classmethod
    def from_photos(
        cls,
        photos: PhotoSource | Sequence[PhotoSource],
        extractor: FaceExtractor | None = None,
        *,
        pick: Pick = "largest",
        name: str | None = None,
    ) -> Identity:
        """Make an identity from one photo, or from several of the same person in any order.

        extractor: a `FaceExtractor`; the default one if None. pick: which face in each photo, see `FaceExtractor.face`.

        One photo gives its face's raw embedding unchanged. Several give a robust mean: see `idgen.embeddings.combine`.
        A photo whose face disagrees with the majority is left out and named in a warning. Keypoints and crop are those
        of the best photo: the surest and largest face.

        Raises `BadRequest` when the photos show different people without a majority; `BadImage` and `NoFaceFound` as
        the extractor does.
        """
        sources = _as_list(photos)
        if not sources:
            raise BadRequest("an identity needs at least one photo.", field="photos")
        if extractor is None:
            from idgen.api import default_extractor

            extractor = default_extractor()
        faces = [extractor.face(source, pick) for source in sources]
        embedding, best = combine(faces, sources)
        return cls(
            embedding,
            keypoints=best.keypoints,
            crop=best.crop(256),
            name=name,
            recogniser=extractor.recogniser_name,
            keypoints_size=best.photo.size,
        )

    @property
    def embeddings(self) -> dict[str, np.ndarray]:
        """Raw features by recogniser, the preferred one first: float32, [512] or [k, 512], read-only."""
        return dict(self._embeddings)

    @property
    def recogniser(self) -> str:
        """Name of the preferred recogniser."""
        return next(iter(self._embeddings))

    @property
    def embedding(self) -> np.ndarray:
        """Raw feature of the preferred recogniser: float32, [512] or [k, 512], read-only."""
        return self._embeddings[self.recogniser]

    @property
    def normed(self) -> np.ndarray:
        """[512] float32 of length 1: the embedding's direction; of k features the mean of their directions."""
        return direction(self.embedding).astype(np.float32)

    @property
    def crop(self) -> Image.Image | None:
        """The aligned crop, RGB, 256 pixels a side when it comes from photos; a copy."""
        return None if self._crop is None else Image.fromarray(self._crop)

    def aligned_crop(self, size: int) -> Image.Image:
        """Return the aligned crop at 112, 224 or 256 pixels, with the geometry of `Face.crop` where that can be had.

        224 is cut out of 256: both scale ArcFace's template by two, so that is the same picture (within one grey level
        of rounding). Raises `BadRequest` when the identity has no crop or `size` is another.
        """
        if self._crop is None:
            raise BadRequest(f"{self!r} has no crop of the face. Make it from a photo, or hand in crop=.", field="crop")
        if size not in (112, 224, 256):
            raise BadRequest(f"crop size {size}: it is 112, 224 or 256.", field="size")
        crop = Image.fromarray(self._crop)
        if crop.width == 256 and size < 256:
            crop = crop.crop((16, 0, 240, 224))
        return crop if crop.width == size else crop.resize((size, size), Image.Resampling.LANCZOS)

    def for_recogniser(self, name: str) -> np.ndarray:
        """Return the raw feature that the recogniser `name` made, [512] or [k, 512] float32.

        An embedding of unknown origin is handed to whoever asks. Raises `BadRequest` naming what is there otherwise:
        embeddings of one recogniser mean nothing to an adapter that was trained on another's.
        """
        if name in self._embeddings:
            return self._embeddings[name]
        if UNKNOWN in self._embeddings:
            return self._embeddings[UNKNOWN]
        raise BadRequest(
            f"{self!r} has no embedding by the recogniser {name!r}, only by {', '.join(self._embeddings)}. "
            "Embeddings do not interchange: make the identity from its photos again with that recogniser.",
            field="identity",
        )

    def joined(self, other: Identity) -> Identity:
        """Return this identity with the embeddings, and what else is missing, of the same person's `other`."""
        posed = self if self.keypoints is not None else other
        return Identity(
            {**self._embeddings, **other._embeddings, **self._embeddings},  # ours first, and ours where both have one
            keypoints=posed.keypoints,
            crop=self._crop if self._crop is not None else other._crop,
            name=self.name or other.name,
            keypoints_size=posed.keypoints_size,
        )

    def cosine(self, other: Identity) -> float:
        """Return the cosine, -1..1, between two identities by the first recogniser that both know.

        Raises `BadRequest` when they share none.
        """
        _, mine, theirs = self._shared(other)[0]
        return float(np.clip(direction(mine) @ direction(theirs), -1, 1))

    def mix(self, other: Identity, t: float) -> Identity:
        """Return the person at `t` (0..1) of the way from this one to `other`; 0 and 1 give the two themselves.

        Spherical interpolation of the directions (Shoemake 1985), the lengths linearly between; for every recogniser
        that both know, feature by feature. Keypoints and crop are those of the nearer one. For directions that are
        opposite no shortest way exists, and a fixed one is taken.

        Raises `BadRequest` for another `t`, without a recogniser in common, and for different numbers of features.
        """
        t = _checked_share(t)
        pairs = self._shared(other)
        if t in (0.0, 1.0):
            return self if t == 0.0 else other
        mixed = {}
        for key, mine, theirs in pairs:
            if mine.shape != theirs.shape:
                raise BadRequest(f"{mine.shape} and {theirs.shape} embeddings cannot be mixed.", field="other")
            rows = [slerp(a, b, t) for a, b in zip(mine.reshape(-1, WIDTH), theirs.reshape(-1, WIDTH))]
            mixed[key] = np.stack(rows).reshape(mine.shape)
        nearer = self if t < 0.5 else other
        names = f"{self.name} + {other.name}" if self.name and other.name else self.name or other.name
        return Identity(mixed, nearer.keypoints, nearer._crop, name=names, keypoints_size=nearer.keypoints_size)

    def save(self, path: str | Path) -> None:
        """Write the identity to a safetensors file, replacing it in one step. Raises `BadRequest` if it cannot be."""
        from idgen.identity_file import write

        write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """Read what `save` wrote, bit-equal. Raises `BadRequest` without such a file, `BadWeights` for any other."""
        from idgen.identity_file import read

        return read(Path(path))

    def to_bytes(self) -> bytes:
        """Return what `save` would write, to keep it elsewhere, such as in a portrait's metadata."""
        from idgen.identity_file import to_bytes

        return to_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Identity:
        """Return the identity that `to_bytes` packed, bit-equal. Raises `BadWeights` for any other content."""
        from idgen.identity_file import from_bytes

        return from_bytes(data)

    def _shared(self, other: Identity) -> list[tuple[str, np.ndarray, np.ndarray]]:
        keys = [key for key in self._embeddings if key in other._embeddings]
        if keys:
            return [(key, self._embeddings[key], other._embeddings[key]) for key in keys]
        if UNKNOWN in self._embeddings:
            return [(other.recogniser, self._embeddings[UNKNOWN], other.embedding)]
        if UNKNOWN in other._embeddings:
            return [(self.recogniser, self.embedding, other._embeddings[UNKNOWN])]
        raise BadRequest(
            f"{self!r} and {other!r} were made by different recognisers, so they cannot be compared or mixed. "
            "Make both from their photos with the same one.",
            field="other",
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identity):
            return NotImplemented
        return (
            (self.name, self.keypoints_size) == (other.name, other.keypoints_size)
            and list(self._embeddings) == list(other._embeddings)
            and all(np.array_equal(self._embeddings[key], other._embeddings[key]) for key in self._embeddings)
            and _same(self.keypoints, other.keypoints)
            and _same(self._crop, other._crop)
        )

    def __hash__(self) -> int:
        return hash((self.name, *self._embeddings, self.embedding.tobytes()))

    def __repr__(self) -> str:
        made = ", ".join(f"{key} {list(value.shape)}" for key, value in self._embeddings.items())
        extras = [word for word, value in (("keypoints", self.keypoints), ("crop", self._crop)) if value is not None]
        return f"<Identity {self.name or 'without a name'}: {', '.join([made, *extras])}>"


def _as_list(photos: Any) -> list[Any]:
    """One photo or several; a path, bytes and an array can be iterated over too, yet each is one."""
    return list(photos) if isinstance(photos, list | tuple) or hasattr(photos, "__next__") else [photos]


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def _frozen(array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    copy = np.array(array, dtype=dtype, order="C")
    copy.flags.writeable = False
    return copy


def _numbers(value: Any, field: str) -> np.ndarray:
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


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise BadRequest(f"a recogniser's name is text, not {name!r}.", field="recogniser")
    return name


def _checked_embedding(value: Any, name: str) -> np.ndarray:
    array = _numbers(value, "embedding")
    if array.ndim not in (1, 2) or array.shape[-1] != WIDTH or array.size == 0:
        raise BadRequest(f"embedding {name!r} has the shape {array.shape}, not [512] or [k, 512].", field="embedding")
    lengths = np.linalg.norm(array.reshape(-1, WIDTH).astype(np.float64), axis=1)
    if lengths.min() < 1e-12 or not np.isfinite(np.float32(lengths.max())):
        raise BadRequest(f"embedding {name!r} is zero or too large: it is nobody's face.", field="embedding")
    return _frozen(array, np.float32)


def _checked_keypoints(value: Any) -> np.ndarray:
    array = _numbers(value, "keypoints")
    if array.shape != (5, 2):
        raise BadRequest(f"keypoints have the shape {array.shape}, not [5, 2].", field="keypoints")
    # Drawing truncates to whole pixels and degrees, so rounding points to float32 could move a stick.
    return _frozen(np.asarray(value), np.float32 if np.asarray(value).dtype == np.float32 else np.float64)


def _checked_size(value: Any) -> tuple[int, int]:
    try:
        width, height = (operator.index(side) for side in value)
    except (TypeError, ValueError) as error:
        raise BadRequest(f"keypoints_size is (width, height), not {value!r}.", field="keypoints_size") from error
    if min(width, height) < 1:
        raise BadRequest(f"keypoints_size {width} x {height} must be positive.", field="keypoints_size")
    return width, height


def _checked_share(t: Any) -> float:
    try:
        share = float(t)
    except (TypeError, ValueError) as error:
        raise BadRequest(f"t must be a number within 0..1, not {t!r}.", field="t") from error
    if not 0 <= share <= 1:
        raise BadRequest(f"t is {share:g}; it must lie within 0..1.", field="t")
    return share


def _checked_crop(value: Any) -> np.ndarray:
    array = np.asarray(open_photo(value))
    if array.shape[0] != array.shape[1]:
        raise BadRequest(f"an aligned crop is square, not {array.shape[1]} x {array.shape[0]}.", field="crop")
    return _frozen(array, np.uint8)
