"""Options and paths shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
