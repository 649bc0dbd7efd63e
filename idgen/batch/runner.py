"""`idgen.render_batch`: a prompt file in, a finished folder out."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from idgen.batch import results, sources
from idgen.batch.names import TEMPLATE
from idgen.batch.plan import Plan, Problem, room_for_plans
from idgen.batch.progress import Bar
from idgen.batch.render import AUTO, Renderer
from idgen.batch.results import Outcome, Summary
from idgen.batch.rows import folder_of, read_rows
from idgen.batch.sheet import contact_sheet
from idgen.batch.storage import Folder, open_folder
from idgen.batch.writer import Writer
from idgen.errors import BadRequest, Cancelled, IdgenError

log = logging.getLogger("idgen")

UNEXPECTED_IN_A_ROW = 20
"""So many failures that are not the rows' fault, one after another, mean that the machine is ill: stop, resumably."""
SHOWN_PROBLEMS = 1000


def render_batch(
    rows: str | os.PathLike[str] | Iterable[dict[str, Any]],
    out: str | os.PathLike[str],
    *,
    defaults: dict[str, Any] | None = None,
    matrix: dict[str, Any] | None = None,
    name: str = TEMPLATE,
    batch_size: int | None = None,
    strict: bool = False,
    dry_run: bool = False,
    ray: str | None = None,
    workers: int | None = None,
    progress: bool | None = None,
    on_problem: Callable[[Problem], None] | None = None,
    **settings: Any,
) -> Summary:
    """Render all rows of a prompt file into a folder; go on where an earlier run of the same stopped.

    Args:
        rows: a prompt file (``.txt``, ``.csv``, ``.jsonl``, ``.yaml``; a path or an fsspec URL), or mappings.
        out: the folder, or an fsspec URL. It gets the images, ``results.jsonl``, ``index.html``, ``summary.json``.
        defaults: fields of a request for rows that do not give them.
        matrix: axes (``people``, ``prompts``, ``pipelines``, ``seeds`` or any field) for rows without that field.
        name: template of the images' names; see :mod:`idgen.batch.names`.
        batch_size: images in one UNet call at most, 1 or more; ``None``: 8. Out of memory halves it.
        strict: raise for the first bad row, before anything is rendered where it can be known, instead of skipping it.
        dry_run: check every row and every photo (decoded; with a face where one is needed), render and write nothing.
        ray: ``"auto"`` or a cluster's address: render on Ray (see :mod:`idgen.cluster`).
        workers: Ray actors; ``None``: one for each GPU of the cluster, without GPUs one for each CPU.
        progress: show a bar on stderr; ``None``: where stderr is a terminal.
        on_problem: called for each bad row while the file is read.
        settings: of :func:`idgen.load`: ``base``, ``adapter``, ``faces``, ``device``, ``dtype`` ...
    Raises:
        BadRequest: the file, the folder or a setting is wrong, or the file has no rows; with ``strict`` a row is wrong.
        DiskFull, Cancelled (Ctrl-C): all that was finished is kept, and the same call goes on from there.
    """
    if batch_size is not None and batch_size < 1:
        raise BadRequest(f"batch_size: {batch_size}; it is at least 1.", "batch_size")
    source = rows if not isinstance(rows, os.PathLike) else Path(rows)
    sources.forget()
    begun = time.perf_counter()
    plan = Plan(name, folder_of(source), settings)
    summary = Summary(str(out))
    # From here on, not only while rendering: an interrupt inside the import of a library would leave half of it behind.
    with stoppable() as stopped, room_for_plans(), closing(plan.db):
        extractor = _extractor(settings) if dry_run else None
        for row in read_rows(source, defaults or {}, matrix or {}):  # type: ignore[arg-type]
            if stopped():
                raise Cancelled("stopped while the rows were read; nothing was rendered.")
            problem = plan.add(row, extractor, deep=dry_run)
            if problem is None:
                continue
            if on_problem is not None:
                on_problem(problem)
            if len(summary.problems) < SHOWN_PROBLEMS:
                summary.problems.append(problem)
        if not plan.rows and isinstance(source, str | Path):  # from code an empty list may well be meant
            raise BadRequest(
                f"{source} has no rows. A row is a line with a prompt (.txt), a line below the header (.csv), "
                "an object (.jsonl) or an item of a list (.yaml).",
                "file",
            )
        summary.rows, summary.images, summary.failed = plan.rows, plan.count(), plan.count("problems")
        if strict and summary.problems and not dry_run:
            raise _strict(summary.problems[0].line, summary.problems[0].message)
        if not dry_run:
            with closing(open_folder(out)) as folder:
                _run(plan, folder, summary, settings, batch_size, strict, ray, workers, progress, stopped)
    summary.seconds = round(time.perf_counter() - begun, 3)
    return summary


def _run(
    plan: Plan,
    folder: Folder,
    summary: Summary,
    settings: dict[str, Any],
    batch_size: int | None,
    strict: bool,
    ray: str | None,
    workers: int | None,
    progress: bool | None,
    stopped: Callable[[], bool],
) -> None:
    begun = time.perf_counter()
    results.load(plan, folder)
    summary.kept = results.mark_done(plan, folder)
    results.record_problems(plan, folder)
    pending = plan.count("pending")
    trouble: IdgenError | None = None
    with Bar(pending, progress) as bar, Writer(folder, bar.advance) as writer:
        outcomes = _local(plan, settings, batch_size, stopped)
        if ray is not None and pending:
            from idgen.cluster import render

            outcomes = render(plan, folder.name, settings, batch_size, stopped, address=ray, workers=workers)
        try:
            _collect(outcomes, writer, strict)
        except IdgenError as error:
            trouble = error
    trouble = trouble or writer.error  # type: ignore[assignment]
    summary.rendered = bar.done
    summary.images_per_second = round(bar.done / bar.seconds, 4) if bar.seconds else 0.0
    if trouble is None and stopped() and plan.count("pending") > bar.done + bar.failed:
        left = pending - bar.done - bar.failed
        trouble = Cancelled(f"stopped; {left} of {summary.images} images are left. The same command goes on from here.")
    try:
        results.tidy(plan, folder)
        summary.failed = results.failures(plan.db)
        summary.likeness = results.likeness(plan.db)
        summary.seconds = round(time.perf_counter() - begun, 3)
        folder.write("index.html", contact_sheet(results.records(plan), folder.name).encode())
        folder.write("summary.json", json.dumps(summary.as_dict(), indent=2).encode())
    except IdgenError as error:  # on a full disk the pages may not fit; what was rendered is recorded all the same
        trouble = trouble or error
    if trouble is not None:
        raise trouble


def _local(
    plan: Plan, settings: dict[str, Any], batch_size: int | None, stopped: Callable[[], bool]
) -> Iterator[Outcome]:
    renderer = Renderer(settings, batch_size)
    # Windows of several batches, because only a loaded model tells which prompts have equally many tokens.
    for window in plan.windows(8 * (batch_size or AUTO)):
        yield from renderer.render(window, stopped)
        if stopped():
            return


def _collect(outcomes: Iterator[Outcome], writer: Writer, strict: bool) -> None:
    unexpected = 0
    for outcome in outcomes:
        writer.put(outcome)
        unexpected = unexpected + 1 if outcome.unexpected else 0
        if outcome.error is not None and strict:
            raise _strict(outcome.unit.line, outcome.error)
        if unexpected == UNEXPECTED_IN_A_ROW:
            raise IdgenError(
                f"{unexpected} images in a row failed with errors that are not the rows' fault, last: {outcome.error} "
                "Nothing finished is lost."
            )


def _strict(line: int, message: str) -> BadRequest:
    return BadRequest(f"line {line}: {message} (--strict stops here; without it the row is skipped.)")


def _extractor(settings: dict[str, Any]) -> Any:
    """What finds faces in a dry run; None where no face pack is here, and then only decoding is checked."""
    from idgen.api import default_extractor
    from idgen.errors import WeightsMissing
    from idgen.faces import FaceExtractor

    if settings.get("faces"):
        recogniser = settings.get("recogniser")
        return FaceExtractor(Path(settings["faces"]), Path(recogniser) if recogniser else None, device="cpu")
    try:
        return default_extractor()
    except WeightsMissing:
        log.warning("no face pack is here, so photos are decoded but not searched for faces.")
        return None


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """While inside, the first Ctrl-C (or SIGTERM, as clusters send it) only asks to stop: the images in hand are
    finished and recorded. A second one interrupts at once, which loses no more than those."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event.is_set  # signals belong to the main thread
        return

    counted = itertools.count()

    def stop(number: int, frame: object) -> None:
        if next(counted):
            raise KeyboardInterrupt
        event.set()
        log.warning("stopping after the images in hand; once more to stop at once.")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
