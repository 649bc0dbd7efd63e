"""A portrait: one result, with all that is needed to make it again."""

from __future__ import annotations

import io
import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from idgen.errors import BadImage, BadRequest

METADATA_KEY = "idgen"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass(frozen=True, eq=False)
class Portrait:
    """One generated picture.

    ``likeness`` is the cosine in [-1, 1] between the identity's embedding and that of the face found in the picture, by
    the recogniser that made the identity. ``None`` when it could not be measured; ``likeness_note`` then says why.
    """

    image: Image.Image
    seed: int
    likeness: float | None
    likeness_note: str | None
    provenance: dict[str, Any] = field(default_factory=dict)
    """request, pipeline, base, weights' hashes, versions: JSON-serialisable"""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture; PNGs carry the provenance in their metadata. Never leaves a half-written file.

        Raises:
            BadRequest: the suffix names no format we write, or the folder is not there or not writable.
        """
        path = Path(path)
        data = self.to_bytes(path.suffix)
        # Not tempfile's, which nobody else may read: a web server could not show the picture.
        temporary = path.with_name(f".idgen-{uuid.uuid4().hex}{path.suffix}")
        try:
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise BadRequest(f"cannot write {path}: {error.strerror or error}.", "out") from None
        return path

    def to_bytes(self, suffix: str = ".png") -> bytes:
        """What :meth:`save` writes to a file of this suffix.

        Raises:
            BadRequest: the suffix names no format we write.
        """
        kind = FORMATS.get(suffix.lower())
        if kind is None:
            raise BadRequest(f"{suffix or 'no suffix'}: portraits are saved as {', '.join(FORMATS)}.", "out")
        options: dict[str, Any] = {"quality": 95} if kind != "PNG" else {"pnginfo": self._png_info()}
        buffer = io.BytesIO()
        self.image.save(buffer, kind, **options)
        return buffer.getvalue()

    def _png_info(self) -> PngInfo:
        info = PngInfo()
        info.add_itxt(METADATA_KEY, json.dumps(self.metadata(), sort_keys=True))
        return info

    def metadata(self) -> dict[str, Any]:
        """What :meth:`save` writes into a PNG."""
        return {**self.provenance, "seed": self.seed, "likeness": self.likeness}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The provenance of a portrait saved as PNG.

    Raises:
        BadImage: it is not a readable picture, or carries no idgen metadata.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(METADATA_KEY)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadImage(f"{path} cannot be read as a picture ({error}).") from None
    try:
        data = json.loads(text) if text else None
    except ValueError:
        data = None
    if not isinstance(data, dict) or "request" not in data:
        raise BadImage(
            f"{path} carries no idgen metadata; only PNGs saved by idgen do (copies by other tools may not)."
        )
    return data
