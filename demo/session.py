"""What the demo knows of one browser page. Nothing is shared between pages, and closing one removes its files."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idgen.demo.people import Sitting

if TYPE_CHECKING:
    from idgen.portrait import Portrait
    from idgen.request import Request

KEPT = 100
"""Portraits a page remembers; older ones are forgotten, so that a page left open does not fill the memory."""


@dataclass(frozen=True, eq=False)
class Shot:
    """A portrait together with the request that makes it again. :meth:`Session.path` gives its PNG."""

    portrait: Portrait
    request: Request
    seconds: float
    name: str
    """of its file"""

    @property
    def caption(self) -> str:
        """One line below the picture."""
        return f"{likeness(self.portrait.likeness)} · seed {self.portrait.seed}"


def likeness(value: float | None) -> str:
    """A likeness score in words."""
    return "likeness –" if value is None else f"likeness {value:.2f}"


class Session:
    """One page: its photos, the work it is waiting for, and its portraits, newest last."""

    # No dataclass: Gradio would copy one field by field into the page's configuration.

    def __init__(self) -> None:
        self.sittings: list[Sitting] = []
        self.shown = 0
        """The photo whose faces are on show."""
        self.shots: list[Shot] = []
        self.gallery: list[Shot] = []
        """The portraits in the gallery of the Create tab."""
        self.selected = 0
        self.closed = False
        self._jobs: set[Any] = set()
        self._folder: Path | None = None
        self._names = itertools.count(1)
        # Not a plain lock: a run that nobody reads any more unwatches its job wherever its garbage is found.
        self._lock = threading.RLock()
        self._cancelled = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """Gradio deep-copies a state's first value for each page: give each an empty one of its own."""
        return Session()

    @property
    def folder(self) -> Path:
        """This page's own temporary folder."""
        with self._lock:
            if self._folder is None or not self._folder.is_dir():
                self._folder = Path(tempfile.mkdtemp(prefix="idgen-demo-"))
            return self._folder

    def new_folder(self, name: str) -> Path:
        """A new folder inside this page's own."""
        folder = self.folder / f"{name}-{next(self._names)}"
        folder.mkdir()
        return folder

    @property
    def chosen(self) -> Shot | None:
        """The portrait selected in the gallery."""
        return self.gallery[self.selected] if 0 <= self.selected < len(self.gallery) else None

    def begin(self) -> None:
        """A new piece of work starts: an earlier Cancel does not count for it."""
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether the user asked to stop the work that is going on, or left."""
        return self._cancelled or self.closed

    def watch(self, job: Any) -> None:
        """Remember a job, so that Cancel and leaving the page stop it."""
        with self._lock:
            self._jobs.add(job)
        if self.cancelled:
            job.cancel()

    def unwatch(self, job: Any) -> None:
        """The job has ended."""
        with self._lock:
            self._jobs.discard(job)

    def cancel(self) -> None:
        """Stop everything this page is waiting for."""
        self._cancelled = True
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.cancel()

    def keep(self, portraits: list[Portrait], request: Request, seconds: float) -> list[Shot]:
        """Remember portraits. ``seconds`` is for all of them together."""
        made = []
        for portrait in portraits:
            name = f"idgen-{request.pipeline}-{portrait.seed}-{next(self._names)}.png"
            again = request.change(n=1, seed=portrait.seed)
            made.append(Shot(portrait, again, seconds / len(portraits), name))
        self.shots += made
        for old in self.shots[:-KEPT]:
            (self.folder / old.name).unlink(missing_ok=True)
        del self.shots[:-KEPT]
        return made

    def path(self, shot: Shot) -> str:
        """The portrait's PNG with its provenance, written when it is first asked for.

        And again after the files were removed because the browser seemed gone: phones come and go.
        """
        file = self.folder / shot.name
        if not file.is_file():
            shot.portrait.save(file)
        return str(file)

    def forget(self) -> None:
        """Remove every portrait and file of this page."""
        self.shots.clear()
        self.gallery.clear()
        self.selected = 0
        self.remove_files()

    def remove_files(self) -> None:
        """Remove this page's folder."""
        with self._lock:
            folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def leave(self) -> None:
        """The browser went away, perhaps only for a moment: stop the work and delete the files, keep the rest."""
        self.cancel()
        self.remove_files()

    def close(self) -> None:
        """The page will not come back: forget everything."""
        self.closed = True
        self.leave()
        self.sittings.clear()
        self.shots.clear()
        self.gallery.clear()
