"""The progress bar of a batch: rate, time left, failures; silent where nobody watches."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from idgen.batch.results import Outcome


class Bar:
    """Counts outcomes, and shows them on stderr. A context manager."""

    def __init__(self, total: int, shown: bool | None) -> None:
        """shown: None shows the bar where stderr is a terminal."""
        self.total = total
        self.done = self.failed = 0
        self._lock = threading.Lock()
        self._begun = self._last = time.perf_counter()
        self._shown = shown
        self._bar: Any = None

    @property
    def seconds(self) -> float:
        """From the beginning to the last outcome so far, the loading of models included."""
        return self._last - self._begun

    def __enter__(self) -> Bar:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if console.is_terminal if self._shown is None else self._shown:
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
            rate = TextColumn("{task.fields[rate]}")
            self._bar = Progress(*columns, rate, "left:", TimeRemainingColumn(), console=console)
            self._bar.start()
            self._task = self._bar.add_task("rendering", total=self.total, rate="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, outcome: Outcome) -> None:
        """Count one outcome. Any thread may call it."""
        with self._lock:
            self._last = time.perf_counter()
            if outcome.error is None:
                self.done += 1
            else:
                self.failed += 1
            if self._bar is not None:
                rate = f"{self.done / max(self.seconds, 1e-9):.2f}/s" + (
                    f", {self.failed} failed" if self.failed else ""
                )
                self._bar.update(self._task, advance=1, rate=rate)
