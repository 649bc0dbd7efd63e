"""The plan of a batch: every image there is to make, under which name, and what is done already.

It lies in a temporary database on disk, so that a plan of a million rows takes no more memory than one of ten.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from idgen.batch import sources
from idgen.batch.names import check_template, file_name, person_of
from idgen.batch.rows import Row
from idgen.batch.storage import DiskFull
from idgen.errors import BadRequest, IdgenError

VERSION = 2
"""Of the fingerprint. Raise it when the same request means other pixels."""


@dataclass(frozen=True)
class Unit:
    """One image of one row."""

    row: int
    image: int
    """from 0 to n - 1"""
    line: int
    person: str
    pipeline: str
    seed: int
    fields: dict[str, Any]
    """of a `Request` with n = 1, JSON-serialisable; photos as absolute paths or URLs"""
    file: str
    """relative to the output folder"""
    fingerprint: str
    """sha256 of all that decides the pixels, the photos' content included"""

    def to_json(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Unit:
        """What `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Problem:
    """A row that cannot be rendered, and the cure."""

    row: int
    line: int
    message: str


@contextmanager
def room_for_plans() -> Iterator[None]:
    """Say so clearly when the folder for temporary files, where plans lie, is full. Raises `DiskFull`."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" not in str(error):
            raise
        raise DiskFull(
            "the folder for temporary files is full. Every finished image is kept: free some space there, or set "
            "SQLITE_TMPDIR to a folder with more, and run the same command again."
        ) from None


class Plan:
    """All units and problems of a prompt file. Use from one thread."""

    def __init__(self, template: str, folder: str, settings: dict[str, Any]) -> None:
        """template: see `idgen.batch.names`. folder: what relative paths are relative to. settings: of `idgen.load`,
        part of every fingerprint. Raises `BadRequest` for a template that names nothing or leaves the folder."""
        check_template(template)
        self.template, self.folder = template, folder
        # Where a job runs and how fast does not decide what it shows.
        self.settings = {k: str(v) for k, v in sorted(settings.items()) if v is not None and k not in _SPEED}
        self.rows = 0
        self.db = sqlite3.connect("")  # a temporary file, which vanishes with the connection
        self.db.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE units (row, image, grp, who, prompt, done DEFAULT 0, text, PRIMARY KEY (row, image));
            CREATE TABLE problems (row PRIMARY KEY, line, message);
            CREATE TABLE names (name PRIMARY KEY, line);
            CREATE TABLE seen (digest PRIMARY KEY, times);
            CREATE TABLE results (row, image, status, pipeline, likeness, file, fingerprint, error, text,
                                  PRIMARY KEY (row, image));
            """
        )

    def add(self, row: Row, extractor: Any = None, *, deep: bool = False) -> Problem | None:
        """Take in a row; return what is wrong with it.

        deep: decode every photo, and find the face in it where there is an `extractor`.
        """
        self.rows += 1
        try:
            if row.problem is not None:
                raise row.problem
            units, group, who = self._units(row, extractor, deep)
            for unit in units:
                self._claim(unit)
        except IdgenError as error:
            problem = Problem(row.number, row.line, str(error))
            self.db.execute("INSERT INTO problems VALUES (?, ?, ?)", (row.number, row.line, str(error)))
            return problem
        self.db.executemany(
            "INSERT INTO units (row, image, grp, who, prompt, text) VALUES (?, ?, ?, ?, ?, ?)",
            [(u.row, u.image, group, who, u.fields.get("prompt"), u.to_json()) for u in units],
        )
        return None

    def units(self) -> Iterator[Unit]:
        """All units, in the order of their rows."""
        for (text,) in self.db.execute("SELECT text FROM units ORDER BY row, image"):
            yield Unit.from_json(text)

    def problems(self) -> Iterator[Problem]:
        """All problems, in the order of their rows."""
        for found in self.db.execute("SELECT row, line, message FROM problems ORDER BY row"):
            yield Problem(*found)

    def mark_done(self, row: int, image: int) -> None:
        """Take a unit out of what is to be rendered."""
        self.db.execute("UPDATE units SET done = 1 WHERE row = ? AND image = ?", (row, image))

    def count(self, what: str = "units") -> int:
        """How many ``units``, ``problems`` or ``pending`` units there are."""
        table = "units WHERE NOT done" if what == "pending" else {"units": "units", "problems": "problems"}[what]
        return int(self.db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    def windows(self, size: int) -> Iterator[list[Unit]]:
        """What is to be rendered, in lists of at most `size` units that are likely to share a UNet call.

        People and prompts are remembered by the renderer, but not without end; so whichever there are more of comes
        in order, and all of its rows are rendered while it is remembered.
        """
        people, prompts = self.db.execute("SELECT count(DISTINCT who), count(DISTINCT prompt) FROM units").fetchone()
        order = "who, prompt" if people >= prompts else "prompt, who"
        window: list[Unit] = []
        last = None
        cursor = self.db.execute(f"SELECT grp, text FROM units WHERE NOT done ORDER BY grp, {order}, row, image")
        for group, text in cursor:
            if window and (group != last or len(window) == size):
                yield window
                window = []
            window.append(Unit.from_json(text))
            last = group
        if window:
            yield window

    def _units(self, row: Row, extractor: Any, deep: bool) -> tuple[list[Unit], str, str]:
        from idgen.request import Request
        from idgen.schedulers import SCHEDULERS

        fields = {k: self._resolved(v) if k in sources.FILES else v for k, v in row.fields.items() if k != "person"}
        request = Request.create(**fields)
        if request.scheduler not in (None, "default", *SCHEDULERS):
            raise BadRequest(f"scheduler {request.scheduler!r}: choose one of {', '.join(SCHEDULERS)}.", "scheduler")
        if request.image_embedding is not None:
            raise BadRequest("image_embedding is for calls from code; give the picture as photo.", "image_embedding")
        pipeline, classes = self._pipeline(request.pipeline)
        wants_face = any(cls.recogniser for cls in classes)
        if wants_face and request.who is None:
            raise BadRequest(f"{pipeline} needs a photo or an identity: give photo.", "who")
        # The request's own values, not the file's: "7" of a CSV cell and 7 are the same seed.
        decided = {name: getattr(request, name) for name in fields} | {"pipeline": pipeline}
        hashed = {name: _hash(value) if name in sources.FILES else value for name, value in decided.items()}
        if deep:
            for name in sources.FILES:
                sources.check(name, decided.get(name), extractor if wants_face else None)
        n = decided.pop("n", 1)
        hashed.pop("n", None)
        seed = decided.get("seed")
        if seed is None:
            seed = self._own_seed(hashed)
        person = person_of(row.fields.get("person"), request.who)
        units = []
        for image in range(n):
            one = {**decided, "seed": seed + image}
            print_of = _digest({"v": VERSION, **hashed, "seed": seed + image, "settings": self.settings})
            file = file_name(
                self.template, row=row.number, line=row.line, person=person, pipeline=pipeline, seed=seed + image,
                image=image, id=print_of[:12],
            )  # fmt: skip
            units.append(Unit(row.number, image, row.line, person, pipeline, seed + image, one, file, print_of))
        return units, _group(request, classes[0].defaults, pipeline), str(hashed.get("who"))

    def _resolved(self, value: Any) -> Any:
        """Paths made absolute. Text cells name several photos of a person with ``|`` between them."""
        if isinstance(value, str):
            parts = [part.strip() for part in value.split("|") if part.strip()]
            return [sources.resolve(p, self.folder) for p in parts] if len(parts) > 1 else self._one(value.strip())
        return [self._one(each) if isinstance(each, str) else each for each in value] if _paths(value) else value

    def _one(self, value: str) -> str:
        if not value:
            raise BadRequest("photo: the path is empty.", "who")
        return sources.resolve(value, self.folder)

    def _pipeline(self, name: str) -> tuple[str, list[Any]]:
        from idgen.registry import methods_of

        if name == "auto":
            name = self._auto()
        return name, methods_of(name)

    def _auto(self) -> str:
        """What ``auto`` means on this machine, decided once, so that all rows and every resumed run agree."""
        from idgen.api import choose

        if not hasattr(self, "_chosen"):
            self._chosen: str = choose(self.settings.get("base"))[0]
        return self._chosen

    def _own_seed(self, hashed: dict[str, Any]) -> int:
        """The seed of a row that gives none: from its content, so that a resumed run finds the same one; rows that
        are equal get different ones."""
        digest = _digest(hashed)
        self.db.execute(
            "INSERT INTO seen VALUES (?, 1) ON CONFLICT (digest) DO UPDATE SET times = times + 1", (digest,)
        )
        times = self.db.execute("SELECT times FROM seen WHERE digest = ?", (digest,)).fetchone()[0]
        return int(_digest([digest, times])[:8], 16)

    def _claim(self, unit: Unit) -> None:
        key = unit.file.casefold()  # not every file system knows A from a
        try:
            self.db.execute("INSERT INTO names VALUES (?, ?)", (key, unit.line))
        except sqlite3.IntegrityError:
            line = self.db.execute("SELECT line FROM names WHERE name = ?", (key,)).fetchone()[0]
            raise BadRequest(
                f"{unit.file} would overwrite an image of line {line}: put {{row}} or {{seed}} into the name, "
                "or take the double row out.",
                "name",
            ) from None


_SPEED = ("device", "attention", "offload", "vae_slicing", "vae_tiling")


def _paths(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(each, str) for each in value)


def _hash(value: Any) -> Any:
    """Content instead of names: of a file, or of each of several."""
    if isinstance(value, str):
        return sources.content(value)
    return [_hash(each) for each in value] if isinstance(value, list | tuple) else value


def _digest(value: Any) -> str:
    try:
        text = json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        raise BadRequest(
            "a batch takes paths, numbers and text; save pictures and identities to files.", "who"
        ) from None
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _group(request: Any, defaults: Any, pipeline: str) -> str:
    """Rows of one group can share a UNet call, as far as can be told without their photos and prompts' lengths."""
    decided = {
        name: getattr(defaults, name) if getattr(request, name) is None else getattr(request, name)
        for name in ("steps", "guidance", "scheduler")
    }
    shared = {name: getattr(request, name) for name in ("width", "height", "structure_start", "structure_end")}
    given = {name: getattr(request, name) is not None for name in ("image", "mask", "pose", "reference")}
    strength = request.strength if request.image is not None else None
    return json.dumps([pipeline, decided, shared, given, strength, request.guess_mode])
