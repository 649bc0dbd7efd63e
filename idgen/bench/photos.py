"""Photos with faces for measurements: those of mini's invented people that come with the demo."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from PIL import Image


def photos(count: int) -> list[Image.Image]:
    """Different portraits of 1 face each; past the fourth they are those again, each cut by one pixel more, which makes
    them other photos to every cache."""
    spec = importlib.util.find_spec("idgen.demo")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "people"
    people = [Image.open(folder / f"{name}.jpg").convert("RGB") for name in ("ada", "ben", "cleo", "esme")]
    made = []
    for number in range(count):
        again, which = divmod(number, len(people))
        width, height = people[which].size
        made.append(people[which].crop((0, 0, width - again, height)))
    return made
