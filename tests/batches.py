"""Rows to render as a batch, quickly, and what came of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import idgen
from tests import models

FAST = {"pipeline": models.PIPELINE, "size": "32x32", "steps": 1, "guidance": 1.0}


def job_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, to which `render` adds the face pack."""
    folder = tmp_path_factory.mktemp("job")
    models.photos(folder / "photos")
    return folder


def render(job: Path, rows: Any, out: Path, **settings: Any) -> Any:
    defaults = {**FAST, **settings.pop("defaults", {})}
    return idgen.render_batch(rows, out, defaults=defaults, **{**models.settings(job), **settings})


def some_rows(job: Path, count: int, **fields: Any) -> list[dict[str, Any]]:
    people = [str(path) for name, path in models.photos(job / "photos").items() if name != "nobody"]
    return [{"photo": people[k % 3], "prompt": f"p{k % 2}", "seed": k, **fields} for k in range(count)]


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), np.int16)
