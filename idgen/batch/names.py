"""The names of images: a template such as ``{row:05d}-{person}-{pipeline}-{seed}.png``."""

from __future__ import annotations

import re
import string
from pathlib import PurePosixPath
from typing import Any

from idgen.errors import BadRequest

TEMPLATE = "{row:05d}-{person}-{pipeline}-{seed}.png"
FIELDS = {"row": 1, "line": 1, "person": "a", "pipeline": "b", "seed": 1, "image": 0, "id": "0" * 12}
"""What a template may use, with examples: the row's number, its line, ``image`` 0 to n - 1, ``id`` twelve digits of the
request's fingerprint (a name that stays when rows are put in before)."""
_UNSAFE = re.compile(r"[^\w.+-]+")


def check_template(template: str) -> None:
    """Raises `BadRequest` when a template uses what there is not, leaves the folder or names no picture format."""
    from idgen.portrait import FORMATS

    try:
        used = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        unknown = [name for name in used if name not in FIELDS]
        if unknown:
            raise BadRequest(f"--name: there is no {{{unknown[0]}}}; there are {', '.join(FIELDS)}.", "name")
        made = PurePosixPath(template.format(**FIELDS))
    except (ValueError, IndexError) as error:
        raise BadRequest(f"--name {template!r} is no template ({error}), such as {TEMPLATE}.", "name") from None
    if made.is_absolute() or ".." in made.parts or "\\" in template or ":" in str(made):
        raise BadRequest(f"--name {template!r} must stay inside the output folder.", "name")
    if made.suffix.lower() not in FORMATS:
        raise BadRequest(f"--name {template!r}: it must end in one of {', '.join(FORMATS)}.", "name")


def file_name(template: str, **values: Any) -> str:
    """The name of one image, relative to the output folder, with ``/`` between folders."""
    return template.format(**{k: slug(v) if isinstance(v, str) else v for k, v in values.items()})


def slug(text: str) -> str:
    """Letters, digits and ``. _ + -`` of a text, at most 60: a name on every file system."""
    return _UNSAFE.sub("_", text).strip("._")[:60] or "_"


def person_of(label: Any, who: Any) -> str:
    """What to call a row's person: its label, else the first photo's name without its suffix; for numbered photos such
    as ``ada/1.png`` that of their folder."""
    if label is not None:
        return str(label)
    first = who[0] if isinstance(who, list | tuple) and who else who
    if not isinstance(first, str):
        return "nobody"
    path = PurePosixPath(first.replace("\\", "/"))
    return path.parent.name if path.stem.isdigit() and path.parent.name else path.stem
