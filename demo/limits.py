"""What the server that a page belongs to allows. Run alone, the demo has only the bounds of its own fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from idgen.errors import BadRequest
from idgen.images import MAX_PIXELS, open_photo

if TYPE_CHECKING:
    from PIL import Image

    from idgen.engine import Engine
    from idgen.jobs import Job
    from idgen.pipeline import Pipeline
    from idgen.request import Request


@dataclass(frozen=True, eq=False)
class Limits:
    """The server's bounds. The defaults are those of the library."""

    check: Callable[[Request], object] = lambda _: None
    """Raises BadRequest for a request beyond the server's bounds; asked before each is queued."""
    deadline_s: float | None = None
    """Seconds after which a request is given up; ``None``: never."""
    max_photos: int | None = None
    """Photos of the person in one request; ``None``: any number."""
    max_pixels: int = MAX_PIXELS
    """Width x height of a photo."""

    def count(self, photos: int) -> None:
        """Refuse more photos than one request may have. Raises BadRequest."""
        if self.max_photos is not None and photos > self.max_photos:
            raise BadRequest(f"{photos} photos; this server allows at most {self.max_photos}.", "who")

    def photo(self, path: str) -> Image.Image:
        """An uploaded photo. Raises BadImage, also for one with too many pixels, of which none is decoded."""
        return open_photo(path, max_pixels=self.max_pixels)


@dataclass(frozen=True, eq=False)
class LimitedEngine:
    """The engine as the tabs see it: nothing is queued that was not checked, and nothing without its deadline."""

    engine: Engine
    limits: Limits

    def submit(self, request: Request, preview_every: int = 0) -> Job:
        """Queue a request. Raises BadRequest beyond the server's bounds, else as :meth:`idgen.engine.Engine.submit`."""
        self.limits.check(request)
        return self.engine.submit(request, deadline=self.limits.deadline_s, preview_every=preview_every)

    def pipeline(self, name: str) -> Pipeline:
        """As :meth:`idgen.engine.Engine.pipeline`."""
        return self.engine.pipeline(name)

    def loaded(self) -> list[Pipeline]:
        """As :meth:`idgen.engine.Engine.loaded`."""
        return self.engine.loaded()
