"""Encoding and writing of pictures on a thread of its own, while the next ones are being rendered."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from idgen.batch.results import Outcome, to_line
from idgen.batch.storage import Folder


class Writer:
    """Takes outcomes and makes them durable: first the picture, then its record. A context manager.

    A record is never there without its picture. A picture without its record is rendered again by the next run.
    """

    def __init__(self, folder: Folder, written: Callable[[Outcome], None], depth: int = 16) -> None:
        """written: called after each outcome is durable, on the writer's thread. depth: outcomes that may wait;
        beyond it `put` blocks, so that memory stays flat when the disk is slower than the renderer."""
        self.folder, self.written = folder, written
        self.error: BaseException | None = None
        self._queue: queue.Queue[Outcome | None] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._run, name="idgen-batch-writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()

    def put(self, outcome: Outcome) -> None:
        """Hand in an outcome. Raises what went wrong with an earlier one, such as `DiskFull`."""
        if self.error is not None:
            raise self.error
        self._queue.put(outcome)

    def _run(self) -> None:
        while True:
            outcomes = [self._queue.get()]
            while outcomes[-1] is not None and not self._queue.empty():  # what waits is recorded with one write
                outcomes.append(self._queue.get())
            ready = [outcome for outcome in outcomes if outcome is not None]
            if self.error is None and ready:  # after an error the queue is only emptied, so that `put` never hangs
                try:
                    self._write(ready)
                except BaseException as error:  # also a panic of a library that encodes: `put` has to raise it
                    self.error = error
            if outcomes[-1] is None:
                return

    def _write(self, outcomes: list[Outcome]) -> None:
        there: list[Outcome] = []
        try:
            for outcome in outcomes:
                if outcome.error is None and (data := outcome.encoded()):
                    self.folder.write(outcome.unit.file, data)
                outcome.portrait = outcome.data = None
                there.append(outcome)
        finally:  # what was written before the disk was full need not be rendered again
            if there:
                self.folder.append([to_line(outcome.record()) for outcome in there])
            for outcome in there:
                self.written(outcome)
