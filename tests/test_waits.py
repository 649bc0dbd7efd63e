"""Nobody waits forever: for a thread that has died, a process that has failed, or a lock that nobody gives back."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from idgen.batch.results import Outcome
from idgen.batch.storage import LocalFolder
from idgen.batch.writer import Writer
from idgen.errors import IdgenError
from idgen.training import workers
from idgen.weights import records


class Panic(BaseException):
    """What a native library raises where its own code broke: no Exception."""


def ends(work: Any, seconds: float = 30) -> Any:
    """What work returns or raises; a failure where it does not end."""
    came: list[Any] = []

    def run() -> None:
        try:
            came.append(work())
        except BaseException as error:
            came.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert came, "it waits forever"
    return came[0]


def test_a_panic_while_a_batch_writes_reaches_the_batch(tmp_path: Path) -> None:
    class Broken(LocalFolder):
        def append(self, lines: list[bytes]) -> None:
            raise Panic("no unwrap today")

    class Failed(Outcome):
        def record(self) -> dict[str, Any]:
            return {}

    def write() -> None:
        with Writer(Broken(tmp_path), lambda _: None, depth=1) as writer:
            for _ in range(100):
                writer.put(Failed(None, 0.0, error="anything"))  # type: ignore[arg-type]
                time.sleep(0.001)

    assert isinstance(ends(write), Panic)


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for a worker is a shell script: run it on Linux or macOS")
def test_a_training_worker_that_fails_ends_those_that_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker"
    worker.write_text('#!/bin/sh\n[ "$RANK" = 1 ] && exit 3\nexec sleep 1000\n')
    worker.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(worker))
        raised = ends(lambda: workers.launch(["--stage", "any"], 3))
    assert isinstance(raised, RuntimeError) and "3" in str(raised)


def test_a_lock_that_is_never_given_back_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "PATIENCE", 0.1, raising=False)
    guard = tmp_path / ".install.guard"
    holder = FileLock(guard)
    holder.acquire()
    try:

        def wait() -> None:
            from idgen.weights.store import Store

            with Store(tmp_path)._one_at_a_time():
                pass

        raised = ends(wait)
        assert isinstance(raised, IdgenError) and str(guard) in str(raised) and "delete it" in str(raised)
    finally:
        holder.release()
    assert ends(wait) is None
