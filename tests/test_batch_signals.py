"""A batch that is asked to end: Ctrl-C and its kin, at any moment."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import idgen
from idgen.batch import runner
from tests.batches import job_folder, render, some_rows


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job_folder(tmp_path_factory)


def test_a_first_signal_finishes_the_images_in_hand_a_second_interrupts(caplog: pytest.LogCaptureFixture) -> None:
    # Not always Python's own: whoever starts the tests in the background may have it ignored.
    before = signal.getsignal(signal.SIGINT)
    with runner.stoppable() as stopped, caplog.at_level(logging.WARNING):
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped() and "after the images in hand" in caplog.text
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_while_the_rows_are_read_stops_before_anything_is_rendered(job: Path, tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        one, two = some_rows(job, 2)
        yield one
        signal.raise_signal(signal.SIGINT)
        yield two

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(idgen.Cancelled, match="nothing was rendered"):
        render(job, rows(), tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is before and not (tmp_path / "out").exists()


def test_an_interrupt_at_any_moment_is_one_line_and_exit_code_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from idgen.cli import main

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("idgen.batch.render_batch", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["batch", "rows.txt", "--out", str(tmp_path)])
    assert ended.value.code == 130 and capsys.readouterr().err == "idgen: interrupted.\n"
