"""Options and paths shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.engines import Gate

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models of the tests are tiny: more threads only wait for each other, minutes long on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).parent.parent
SHARED_PARITY = REPOSITORY.parent / "shared" / "parity"
BUNDLED_PARITY = Path(__file__).parent / "data" / "parity"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-root", default=None, help="a folder of parity packs to replay instead of the usual ones")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "parity_case" in metafunc.fixturenames:
        from tests.parity import find_cases

        given = metafunc.config.getoption("--parity-root")
        roots = [Path(given)] if given else [BUNDLED_PARITY, *([SHARED_PARITY] if SHARED_PARITY.is_dir() else [])]
        cases = []
        for root in roots:
            found = list(find_cases(root))
            if not found:  # pytest would skip a test that has no cases
                raise pytest.UsageError(f"{root} has no parity packs")
            cases += found
        names = [f"{'bundled' if case.root == BUNDLED_PARITY else 'shared'}:{case.id}" for case in cases]
        metafunc.parametrize("parity_case", cases, ids=names if not given else [case.id for case in cases])


@pytest.fixture(params=[False, True], ids=["in turn", "overlapped"])
def engine_overlap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with pictures decoded between two runs, and once beside the next, as on CUDA."""
    from tests import engines, tiny

    monkeypatch.setattr(tiny.shared(engines.PIPELINE).backbone, "overlap", request.param)


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A loader of tiny models that can be held up; opened when the test ends."""
    from tests.engines import Gate

    with Gate() as gate:
        yield gate
