"""The example people: drawn from the test seeds, so neither trained on nor part of the benchmark's people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .data import SPLIT_SEEDS
from .heads import render, sample_nuisances, sample_people
from .sheets import to_pil

SEED = SPLIT_SEEDS["test"] + 900
SIZE = 256
PEOPLE: dict[str, int] = {
    "ada": 23, "ben": 12, "cleo": 8, "dev": 5, "esme": 13, "finn": 14, "grace": 24, "hugo": 16, "ines": 2, "jomo": 18,
}  # fmt: skip
"""Name of the folder -> row of the people drawn with SEED."""
SHOTS: tuple[dict[str, Any], ...] = (
    {"pose": "front", "expression": "smiling", "light": "soft", "glasses": 0, "hat": 0},
    {"pose": "left", "expression": "neutral", "light": "soft", "glasses": 0, "hat": 0},
    {"pose": "right", "expression": "laughing", "light": "soft", "glasses": 1, "hat": 0},
)
_COLOURS = ("blue", "gray", "green", "purple", "white", "orange", "pink", "yellow", "red", "black")


def write(out: Path) -> list[Path]:
    """Write three photos of each person as ``out/name/1.png`` to ``3.png``; returns the paths."""
    rows = torch.tensor(list(PEOPLE.values()))
    people = sample_people(int(rows.max()) + 1, SEED)[rows]
    written = []
    for k, shot in enumerate(SHOTS):
        for i, name in enumerate(PEOPLE):
            background, shirt = _COLOURS[(i + 3 * k) % 10], _COLOURS[(3 * i + 5 * k + 4) % 10]
            moment = sample_nuisances(1, SEED + 10 * k + i, style="photo", background=background, shirt=shirt, **shot)
            path = out / name / f"{k + 1}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil(render(people[i : i + 1], moment, SIZE).images[0]).save(path, optimize=True)
            written.append(path)
    return written
