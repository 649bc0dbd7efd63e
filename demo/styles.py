"""Style presets and picture sizes: what the demo offers to choose from, read from data."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOBODY = "a person"
"""Stands in for an empty prompt."""

SIZES: dict[str, tuple[int, int] | None] = {
    "Pipeline's own": None,
    "Square 1:1": (1, 1),
    "Portrait 4:5": (4, 5),
    "Portrait 3:4": (3, 4),
    "Story 9:16": (9, 16),
    "Landscape 4:3": (4, 3),
    "Wide 16:9": (16, 9),
}
"""Label -> aspect ratio; the pixels follow from what the base model was trained on."""


@dataclass(frozen=True)
class Style:
    """A preset. ``prompt`` holds ``{prompt}``; ``negative`` is added to the user's own negative prompt."""

    name: str
    prompt: str
    negative: str = ""

    def apply(self, prompt: str, negative: str) -> tuple[str | None, str | None]:
        """The full prompt and negative prompt; ``None`` where both the user and the style say nothing."""
        words = (prompt or "").strip()
        if self.prompt == "{prompt}":
            return words or None, (negative or "").strip() or None
        parts = [part.strip() for part in (negative, self.negative) if part and part.strip()]
        # replace(), not format(): a prompt may hold braces.
        return self.prompt.replace("{prompt}", words or NOBODY), ", ".join(parts) or None


@lru_cache(maxsize=1)
def styles() -> dict[str, Style]:
    """All presets by name, in the file's order; the first changes nothing."""
    data = tomllib.loads((files("idgen.demo") / "styles.toml").read_text(encoding="utf-8"))
    return {entry["name"]: Style(**entry) for entry in data["style"]}


def pixels(label: str, side: int) -> tuple[int, int] | None:
    """Width and height for a size preset, of about ``side`` x ``side`` pixels in all.

    Large sides go to multiples of 64, as SDXL's training buckets did (arXiv:2307.01952, appendix I); small ones to
    multiples of 16, which every U-Net of ours can halve.
    """
    ratio = SIZES.get(label)
    if ratio is None:
        return None
    step = 64 if side >= 512 else 16
    aspect = (ratio[0] / ratio[1]) ** 0.5
    return max(step, round(side * aspect / step) * step), max(step, round(side / aspect / step) * step)
