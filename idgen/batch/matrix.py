"""From what a row says to the fields of requests: other names of fields, sizes, and matrices spelt out."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator
from typing import Any

from idgen.errors import BadRequest

ALIASES = {"photo": "who", "photos": "who", "identity": "who", "negative": "negative_prompt", "name": "person"}
"""Names that people use for a request's fields."""
AXES = {"people": "who", "prompts": "prompt", "pipelines": "pipeline", "seeds": "seed"}
"""Axes of a matrix and the fields they give; any other field of a request is an axis under its own name."""
_RANGE = re.compile(r"\s*(\d{1,18})\s*\.\.\s*(\d{1,18})\s*")
_SIZE = re.compile(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*")


def expand(entry: dict[str, Any], defaults: dict[str, Any], axes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows that an entry of a prompt file stands for: one, or one for each point of its matrix.

    axes: further axes, used where the entry has no such field itself. Later axes run fastest.
    Raises `BadRequest` naming the field that there is not, or the axis that is no list.
    """
    entry = dict(entry)
    own = entry.pop("matrix", None) or {}
    if not isinstance(own, dict):
        raise BadRequest(f"matrix: give axes, such as 'people: [ada.png]'; there are {', '.join(AXES)}.", "matrix")
    fields = rename(entry)
    points = [_axis(name, values) for name, values in own.items()]
    taken = {*fields, *(field for axis in points for point in axis for field in point)}
    for name, values in axes.items():
        axis = _axis(name, values)
        if not any(field in taken for point in axis for field in point):
            points.append(axis)
    below = rename(defaults)
    for combination in itertools.product(*points):
        made = {**below, **fields}
        for point in combination:
            made.update(point)
        yield made


def rename(entry: dict[str, Any]) -> dict[str, Any]:
    """The fields under the request's own names; those that are `None` count as not given.

    Raises `BadRequest` for a field that there is not, naming the nearest.
    """
    from idgen.request import Request

    fields: dict[str, Any] = {}
    for given, value in entry.items():
        name = ALIASES.get(str(given).strip().lower().replace("-", "_"), str(given).strip().lower().replace("-", "_"))
        if value is None:
            continue
        if name == "size":
            fields["width"], fields["height"] = _size(value)
            continue
        if name not in Request.model_fields and name != "person":
            known = [*Request.model_fields, *ALIASES, "size", "person"]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(known)}."
            raise BadRequest(f"a row has no field {str(given)[:60]!r}. {hint}", name)
        fields[name] = value
    return fields


def _size(value: Any) -> tuple[Any, Any]:
    if isinstance(value, list | tuple) and len(value) == 2:
        return value[0], value[1]
    found = _SIZE.fullmatch(str(value))
    if found is None:
        raise BadRequest(f"size: {str(value)[:40]!r} is not WIDTHxHEIGHT, such as 1024x1280.", "size")
    return int(found[1]), int(found[2])


def _axis(name: str, values: Any) -> list[dict[str, Any]]:
    """The points of one axis as fields. A point may be a mapping, which then gives several fields at once."""
    field = AXES.get(name, name)
    found = _RANGE.fullmatch(values) if isinstance(values, str) else None
    if found is not None:
        first, last = int(found[1]), int(found[2])
        if not first <= last < first + 1_000_000:
            raise BadRequest(f"{name}: {values} is no range; write FIRST..LAST, such as 0..9.", name)
        values = range(first, last + 1)
    if not isinstance(values, list | tuple | range):
        values = [values]
    if not values:
        raise BadRequest(f"{name}: the axis is empty, so the matrix has no row.", name)
    return [rename(value) if isinstance(value, dict) else rename({field: value}) for value in values]
