"""Starts the demo as a hub Space: from a clone, where idgen itself need not be installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def prepare() -> None:
    """Make ``idgen`` importable. In a clone its rooms (``demo/``, ``adapters/`` ...) lie beside it, not inside."""
    if find_spec("idgen") is None:
        sys.path.insert(0, str(ROOT))
    if find_spec("idgen.demo") is None:
        import idgen

        idgen.__path__.append(str(ROOT))


if __name__ == "__main__":
    prepare()
    from idgen.demo.app import main

    main()
