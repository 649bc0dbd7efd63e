"""Identity: what is known of one person, from one or several photos. It can be saved, loaded, mixed and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from idgen import identity_checks as checks
from idgen.embeddings import WIDTH, combine, direction, slerp
from idgen.errors import BadRequest
from idgen.images import PhotoSource

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
        crop: aligned crop of the face, best of 256 x 256 pixels (`Face.crop(256)`), from which smaller ones are cut.

        Raises `BadRequest` for shapes that differ, values that are not finite and embeddings of zeros, `BadImage` for
        a crop that is no image.
        """
        by_name = embedding if isinstance(embedding, Mapping) else {recogniser: embedding}
        if not by_name:
            raise BadRequest("an identity needs at least one embedding.", field="embedding")
        self._embeddings = {checks.name(key): checks.embedding(value, key) for key, value in by_name.items()}
        self.keypoints = None if keypoints is None else checks.keypoints(keypoints)
        self.keypoints_size = None if keypoints_size is None else checks.size(keypoints_size)
        self._crop = None if crop is None else checks.crop(crop)
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
        faces = extractor.face_of_each(sources, pick) if len(sources) > 1 else [extractor.face(sources[0], pick)]
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
        of rounding). A crop that is not square was not aligned here, and is handed on as it is.

        Raises `BadRequest` when the identity has no crop or `size` is another.
        """
        if self._crop is None:
            raise BadRequest(f"{self!r} has no crop of the face. Make it from a photo, or hand in crop=.", field="crop")
        if size not in (112, 224, 256):
            raise BadRequest(f"crop size {size}: it is 112, 224 or 256.", field="size")
        crop = Image.fromarray(self._crop)
        if crop.size == (256, 256) and size < 256:
            crop = crop.crop((16, 0, 240, 224))
        return (
            crop
            if crop.width == size or crop.width != crop.height
            else crop.resize((size, size), Image.Resampling.LANCZOS)
        )

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
        t = checks.share(t)
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
