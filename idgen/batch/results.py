"""What came of each image: the records of ``results.jsonl``, how they are written, read back and summed up."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from idgen.batch.plan import Plan, Problem, Unit
from idgen.batch.storage import Folder

if TYPE_CHECKING:
    from idgen.portrait import Portrait

DONE, FAILED = "done", "failed"


@dataclass(eq=False)
class Outcome:
    """What the renderer made of one unit: a portrait (or its encoded picture), or an error."""

    unit: Unit
    seconds: float
    """the unit's share of its UNet call"""
    portrait: Portrait | None = None
    data: bytes | None = None
    """the encoded picture; empty when the worker has written it already"""
    likeness: float | None = None
    note: str | None = None
    error: str | None = None
    unexpected: bool = False
    """The error was not one of idgen's own."""

    def encoded(self) -> bytes:
        """The picture as its file holds it."""
        if self.data is None and self.portrait is not None:
            self.data = self.portrait.to_bytes("." + self.unit.file.rsplit(".", 1)[-1])
        return self.data or b""

    def record(self) -> dict[str, Any]:
        """The line of ``results.jsonl``."""
        unit, failed = self.unit, self.error is not None
        return {
            "row": unit.row,
            "image": unit.image,
            "line": unit.line,
            "status": FAILED if failed else DONE,
            "file": None if failed else unit.file,
            "person": unit.person,
            "pipeline": unit.pipeline,
            "seed": unit.seed,
            "likeness": None if self.likeness is None else round(self.likeness, 6),
            "likeness_note": self.note,
            "seconds": round(self.seconds, 4),
            "error": self.error,
            "fingerprint": unit.fingerprint,
            "request": unit.fields,
        }


def problem_record(problem: Problem) -> dict[str, Any]:
    """The line of ``results.jsonl`` for a row that never came to rendering."""
    return {
        "row": problem.row,
        "image": 0,
        "line": problem.line,
        "status": FAILED,
        "file": None,
        "error": problem.message,
        "fingerprint": None,
    }


def to_line(record: dict[str, Any]) -> bytes:
    """One line of JSON, without its end."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")


@dataclass
class Summary:
    """What a batch came to. `render_batch` returns it; ``summary.json`` holds it."""

    out: str
    rows: int = 0
    images: int = 0
    """that the prompt file asks for, bad rows aside"""
    rendered: int = 0
    """in this run"""
    kept: int = 0
    """found finished from an earlier run"""
    failed: int = 0
    """rows that cannot be rendered, and images that failed"""
    seconds: float = 0.0
    """of this run: reading the prompt file, loading models, rendering, writing"""
    images_per_second: float = 0.0
    """of this run, from the loading of models to the last image written"""
    likeness: dict[str, dict[str, float]] = field(default_factory=dict)
    """pipeline -> images, measured, mean and least likeness; of all runs"""
    problems: list[Problem] = field(default_factory=list)
    """the first thousand"""

    def as_dict(self) -> dict[str, Any]:
        """As ``summary.json`` holds it."""
        from dataclasses import asdict

        return asdict(self)


def load(plan: Plan, folder: Folder) -> None:
    """Read all records of a folder into the plan's database; later ones replace earlier ones of the same image."""
    plan.db.execute("DELETE FROM results")
    for line in folder.log():
        try:
            record = json.loads(line)
            key = (int(record["row"]), int(record["image"]))
        except (ValueError, KeyError, TypeError):
            continue  # the torn end that a killed machine may leave
        plan.db.execute(
            "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*key, *(record.get(k) for k in ("status", "pipeline", "likeness", "file", "fingerprint", "error")),
             line.rstrip(b"\n").decode("utf-8", "replace")),
        )  # fmt: skip


def mark_done(plan: Plan, folder: Folder) -> int:
    """Take out of the plan what is finished: recorded with the same request and name, and its image there."""
    kept = 0
    for unit in plan.units():
        found = plan.db.execute(
            "SELECT file FROM results WHERE row = ? AND image = ? AND status = ? AND fingerprint = ?",
            (unit.row, unit.image, DONE, unit.fingerprint),
        ).fetchone()
        if found and found[0] == unit.file and folder.has(unit.file):
            plan.mark_done(unit.row, unit.image)
            kept += 1
    return kept


def record_problems(plan: Plan, folder: Folder) -> None:
    """Write down the bad rows, except where the results say the same already."""
    lines: list[bytes] = []
    for problem in plan.problems():
        known = plan.db.execute(
            "SELECT error FROM results WHERE row = ? AND image = 0 AND status = ?", (problem.row, FAILED)
        ).fetchone()
        if known is None or known[0] != problem.message:
            lines.append(to_line(problem_record(problem)))
        if len(lines) == 1000:
            folder.append(lines)
            lines = []
    if lines:
        folder.append(lines)


def tidy(plan: Plan, folder: Folder) -> None:
    """Leave one record for each image of the prompt file, in the order of its rows.

    The images of rows that are no longer asked for stay in the folder: nothing of the user's is ever deleted.
    """
    load(plan, folder)
    plan.db.execute(
        "DELETE FROM results WHERE NOT EXISTS (SELECT 1 FROM units u WHERE u.row = results.row AND u.image = "
        "results.image) AND NOT EXISTS (SELECT 1 FROM problems p WHERE p.row = results.row AND results.image = 0)"
    )
    folder.replace_log(f"{text}\n".encode() for (text,) in plan.db.execute(_ORDERED))


_ORDERED = "SELECT text FROM results ORDER BY row, image"


def records(plan: Plan) -> Iterator[dict[str, Any]]:
    """The records that were read last, in the order of their rows."""
    for (text,) in plan.db.execute(_ORDERED):
        yield json.loads(text)


def likeness(db: sqlite3.Connection) -> dict[str, dict[str, float]]:
    """Likeness for each pipeline, over the records that were read last."""
    found = db.execute(
        "SELECT pipeline, count(*), count(likeness), avg(likeness), min(likeness) FROM results "
        "WHERE status = ? GROUP BY pipeline ORDER BY pipeline",
        (DONE,),
    )
    return {
        name: {"images": images, "measured": measured} | ({"mean": mean, "min": least} if measured else {})
        for name, images, measured, mean, least in found
    }


def failures(db: sqlite3.Connection) -> int:
    """How many records say that an image failed."""
    return int(db.execute("SELECT count(*) FROM results WHERE status = ?", (FAILED,)).fetchone()[0])
