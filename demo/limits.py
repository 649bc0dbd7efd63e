"""What the server that a page belongs to allows. Run alone, the demo has only the bounds of its own fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from idgen.engine import Engine
    from idgen.jobs import Job
    from idgen.pipeline import Pipeline
    from idgen.request import Request


@dataclass(frozen=True, eq=False)
class LimitedEngine:
    """The engine as the tabs see it: nothing is queued that was not checked, and nothing without its deadline."""

    engine: Engine
    check: Callable[[Request], object]
    """Raises BadRequest for a request beyond the server's bounds."""
    deadline_s: float | None
    """Seconds after which a request is given up; ``None``: never."""

    def submit(self, request: Request, preview_every: int = 0) -> Job:
        """Queue a request. Raises BadRequest beyond the server's bounds, else as :meth:`idgen.engine.Engine.submit`."""
        self.check(request)
        return self.engine.submit(request, deadline=self.deadline_s, preview_every=preview_every)

    def pipeline(self, name: str) -> Pipeline:
        """As :meth:`idgen.engine.Engine.pipeline`."""
        return self.engine.pipeline(name)

    def loaded(self) -> list[Pipeline]:
        """As :meth:`idgen.engine.Engine.loaded`."""
        return self.engine.loaded()
