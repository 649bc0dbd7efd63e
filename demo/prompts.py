"""A prompt file rendered through the engine for one page. No Gradio here.

Rows are read as :func:`idgen.render_batch` reads them. But they are rendered by the engine that all pages share, so
that a batch waits its turn, can be cancelled and is seen to advance; and a file that comes from a browser may name only
files that came with it, never a path or an address of the server.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from idgen.batch.names import TEMPLATE, file_name, person_of
from idgen.batch.rows import Row, read_rows
from idgen.batch.sheet import contact_sheet
from idgen.batch.sources import FILES, open_source
from idgen.errors import BadRequest, Cancelled, IdgenError
from idgen.jobs import Busy
from idgen.registry import methods_of
from idgen.request import Request

if TYPE_CHECKING:
    from idgen.demo.limits import LimitedEngine, Limits
    from idgen.demo.session import Session

MOST = 500
"""Images of one batch in the demo; ``idgen batch`` has no bound."""
AHEAD = 8
"""Requests handed to the engine at once, so that it can run them together; the other pages' come in between."""

EXAMPLE = """\
# One prompt a line. Flags at the end of a line set other fields.
a photo of a person smiling, wearing a red hat, blue background --n 2
a photo of a person looking surprised, wearing a green shirt, orange background --seed 7
a photo of a person looking angry, wearing glasses, yellow background
a pencil sketch of a person laughing
"""


@dataclass(eq=False)
class Item:
    """One row: its request, or what is wrong with it."""

    row: Row
    person: str = "nobody"
    request: Request | None = None
    records: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class State:
    """How far a batch is."""

    done: int
    total: int
    eta_s: float | None
    newest: list[tuple[str, str]]
    """picture files with captions, newest first"""
    records: list[dict[str, Any]]


def read(
    path: str,
    uploads: Mapping[str, str],
    person: Callable[[str], Any],
    pipeline: str,
    ready: list[str],
    limits: Limits,
) -> list[Item]:
    """The rows of a prompt file, checked.

    uploads: file name -> path of the files that came with it. person: gives who is meant in rows that name nobody, for
    a pipeline. pipeline: for rows that name none. limits: a row beyond them is a bad one. Raises BadRequest when the
    file is none or asks for too much.
    """

    @functools.cache
    def check_photo(path: str) -> None:  # once, however many rows name it
        limits.photo(path)

    items: list[Item] = []
    images = 0
    for row in itertools.islice(read_rows(path, {}, {}), MOST + 1):
        item = Item(row)
        try:
            if row.problem is not None:
                raise row.problem
            request, item.person = _request(row.fields, uploads, person, pipeline, ready)
            _check_files(row.fields, request, limits, check_photo)
            limits.check(request)
            item.request = request
            images += item.request.n
        except IdgenError as error:
            item.records.append(_failed(row, str(error)))
        items.append(item)
    if not items:
        raise BadRequest("the prompt file has no rows. Write one prompt a line.", "file")
    if images > MOST or len(items) > MOST:
        raise BadRequest(f"this is more than {MOST} images; use `idgen batch` on the command line for that.", "file")
    return items


def _request(
    fields: Mapping[str, Any], uploads: Mapping[str, str], person: Callable[[str], Any], pipeline: str, ready: list[str]
) -> tuple[Request, str]:
    given = {name: _uploaded(name, value, uploads) if name in FILES else value for name, value in fields.items()}
    label = person_of(given.pop("person", None), fields.get("who"))
    name = given.get("pipeline") or "auto"
    name = given["pipeline"] = pipeline if name == "auto" else name
    if any(each.name not in ready for each in methods_of(str(name))):
        raise BadRequest(f"pipeline {name!r} cannot run here; these can: {', '.join(ready)}.", "pipeline")
    if "who" not in given:
        given["who"] = person(str(name).split("+")[0])
        label = label if "person" in fields or given["who"] is None else "person"
    return Request.create(**given), label


def _check_files(
    fields: Mapping[str, Any], request: Request, limits: Limits, check_photo: Callable[[str], object]
) -> None:
    """Look at the files that a row names, which the page has not seen yet."""
    for name in [name for name in FILES if name in fields]:
        given = getattr(request, name)
        files = given if isinstance(given, list) else [given]
        if name == "who":
            limits.count(len(files))
        for each in files:
            if isinstance(each, str):  # an identity was loaded already
                check_photo(each)


def _uploaded(name: str, value: Any, uploads: Mapping[str, str]) -> Any:
    parts = value.split("|") if isinstance(value, str) else value if isinstance(value, list) else [value]
    found = []
    for part in parts:
        wanted = PurePosixPath(str(part).strip().replace("\\", "/")).name
        if wanted not in uploads:
            raise BadRequest(f"{name} names {wanted!r}, which was not uploaded. Add it beside the prompt file.", name)
        found.append(uploads[wanted])
    return open_source(name, found if len(found) > 1 else found[0])


def render(session: Session, engine: LimitedEngine, items: list[Item], folder: Path) -> Iterator[State]:
    """Render all rows into a folder; yields a few times a second. Cancelling the session ends it early."""
    waiting = deque(item for item in items if item.request is not None)
    total, done = sum(item.request.n for item in waiting if item.request), 0
    running: dict[Any, Item] = {}
    newest: list[tuple[str, str]] = []
    begun = time.monotonic()
    try:
        while (waiting or running) and not session.cancelled:
            while waiting and len(running) < AHEAD:
                try:
                    job = engine.submit(waiting[0].request)  # type: ignore[arg-type]
                except Busy:
                    break  # the engine serves others too: our turn comes
                running[job] = waiting.popleft()
                session.watch(job)
            for job in [job for job in running if job.done]:
                item = running.pop(job)
                session.unwatch(job)
                _record(item, job, folder)
                made = [(str(folder / r["file"]), _caption(r)) for r in item.records if r["file"]]
                newest = [*reversed(made), *newest][:12]
                done += job.request.n
            spent = time.monotonic() - begun
            records = [record for item in items for record in item.records]
            yield State(done, total, spent / done * (total - done) if done else None, list(newest), records)
            time.sleep(0.2)
    finally:
        for job in running:
            job.cancel()
            session.unwatch(job)


def pack(items: list[Item], folder: Path, title: str) -> Path:
    """A zip of all pictures, ``results.jsonl`` and a contact sheet, beside the folder."""
    records = [record for item in items for record in item.records]
    target = folder.with_suffix(".zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
        for record in records:
            if record["file"]:
                archive.write(folder / record["file"], record["file"])
        archive.writestr("results.jsonl", "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records))
        archive.writestr("index.html", contact_sheet(records, title))
    return target


def _record(item: Item, job: Any, folder: Path) -> None:
    try:
        portraits = job.result()
    except Cancelled:
        return
    except IdgenError as error:
        item.records.append(_failed(item.row, str(error)))
        return
    except Exception as error:  # a fault of ours in one row must not lose the others
        item.records.append(_failed(item.row, f"unexpected error ({type(error).__name__})"))
        return
    seconds = (time.monotonic() - job.submitted) / len(portraits)
    for image, portrait in enumerate(portraits):
        pipeline = portrait.provenance["request"]["pipeline"]
        about = {"row": item.row.number, "line": item.row.line, "person": item.person, "pipeline": pipeline}
        name = file_name(TEMPLATE, **about, seed=portrait.seed, image=image, id="")
        portrait.save(folder / name)
        item.records.append(
            {
                **about,
                "image": image,
                "status": "done",
                "file": name,
                "seed": portrait.seed,
                "likeness": portrait.likeness,
                "likeness_note": portrait.likeness_note,
                "seconds": round(seconds, 3),
                "error": None,
                "request": portrait.provenance["request"],
            }
        )


def _failed(row: Row, message: str) -> dict[str, Any]:
    return {"row": row.number, "line": row.line, "image": 0, "status": "failed", "file": None, "error": message}


def _caption(record: dict[str, Any]) -> str:
    shown = "–" if record["likeness"] is None else f"{record['likeness']:.2f}"
    return f"row {record['row']} · likeness {shown}"
