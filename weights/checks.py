"""Comparing the files on disk with what was recorded at their first download."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from idgen.weights.licences import accept_flag
from idgen.weights.manifest import Entry
from idgen.weights.records import Located, Record, sha256_of


@dataclass(frozen=True)
class Check:
    """The verdict on one file: as recorded, changed since, missing, or never recorded."""

    name: str
    file: str
    status: Literal["ok", "changed", "missing", "unrecorded"]
    cure: str = ""

    @property
    def ok(self) -> bool:
        """False where something is wrong."""
        return self.status in ("ok", "unrecorded")


def how_to_repair(entry: Entry) -> str:
    """The command that replaces damaged files."""
    return f"Download it again: idgen weights pull {entry.name} --force{accept_flag(entry.name)}"


def verify_recorded(entry: Entry, record: Record, root: Path | None) -> Iterator[Check]:
    """Hash each recorded file below ``root`` (None: all are missing)."""
    for file, facts in record.files.items():
        path = root / file if root else None
        if path is None or not path.is_file():
            yield Check(entry.name, file, "missing", how_to_repair(entry))
        elif path.stat().st_size != facts["size"] or sha256_of(path) != facts["sha256"]:
            yield Check(entry.name, file, "changed", how_to_repair(entry))
        else:
            yield Check(entry.name, file, "ok")


def verify_blob(entry: Entry, found: Located, file: str) -> Check:
    """Check a file that was never recorded: the hub names the blobs of large files by their sha256."""
    path = (found.root / file).resolve()
    if len(path.name) != 64 or path.parent.name != "blobs":
        return Check(entry.name, file, "unrecorded", f"Record it: idgen weights pull {entry.name}")
    if sha256_of(path) != path.name:
        return Check(entry.name, file, "changed", how_to_repair(entry))
    return Check(entry.name, file, "ok")
