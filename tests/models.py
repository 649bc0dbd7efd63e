"""Models for tests that render: the bundled mini set.

Faces are found by the tiny packs of `tests.facepacks`: coloured rectangles, in photos that `photos` writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import facepacks
from tests.conftest import REPOSITORY

MINI = REPOSITORY / "weights" / "mini" / "mini-xl"
PIPELINE = "ip-adapter-faceid-plusv2"
SMALL: dict[str, Any] = {"size": "64x64", "steps": 2, "guidance": 3.0}
"""Fields that keep a test's images quick."""


def settings(folder: Path) -> dict[str, Any]:
    """Settings of `idgen.load`, as text, so that a command line can be made of them; the face pack goes to `folder`."""
    pack = folder / "pack"
    if not pack.exists():
        facepacks.pack(pack, size=128)  # looking at an image would otherwise take longer than rendering it
    return {"base": "mini", "faces": str(pack), "device": "cpu", "dtype": "float32"}


def options(folder: Path) -> list[str]:
    """The same settings as options of the command line."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings(folder).items()]


def photos(folder: Path) -> dict[str, Path]:
    """Photos of three people, and ``nobody``, which shows no face."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name in facepacks.PEOPLE:
        made[name] = folder / f"{name}.png"
        facepacks.photo((128, 128), **{name: (32, 24, 96, 104)}).save(made[name])
    made["nobody"] = folder / "nobody.png"
    facepacks.photo((128, 128)).save(made["nobody"])
    return made
