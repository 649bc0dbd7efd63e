"""The lock file: what was downloaded, from which commit, with which sha256; and where files are found again.

``weights.lock.json`` in the store's root is written at the first download. Later downloads of the same weights must
be equal to it, and ``idgen weights verify`` compares the files on disk with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from idgen.errors import BadWeights, IdgenError
from idgen.weights.manifest import Entry
from idgen.weights.sniff import refuse_mislabelled

CHUNK = 4 << 20  # bytes
PATIENCE = 60.0  # seconds; what is done under a guard file takes a moment


@dataclass(frozen=True)
class Located:
    """Where the files of an entry are: ``root`` / each of ``files`` (relative, ``/`` separated)."""

    root: Path
    files: tuple[str, ...]
    commit: str | None = None


@dataclass
class Record:
    """What was recorded at the first download. Sizes are in bytes."""

    source: str
    commit: str | None
    recorded: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def sha256(self) -> dict[str, str]:
        """The sha256 of each file, by its relative path."""
        return {path: facts["sha256"] for path, facts in self.files.items()}


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def make_record(entry: Entry, found: Located) -> Record:
    """Hash the files of an entry.

    Raises:
        BadWeights: a file is plainly not what its name says.
    """
    for name in found.files:
        refuse_mislabelled(found.root / name)
    files = {
        name: {"sha256": sha256_of(found.root / name), "size": (found.root / name).stat().st_size}
        for name in found.files
    }
    return Record(entry.source, found.commit, datetime.now(timezone.utc).isoformat(timespec="seconds"), files)


@contextmanager
def alone(guard: Path) -> Iterator[None]:
    """Hold off other processes that want the same guard file, for work that takes a moment.

    Raises:
        IdgenError: another one has held it for a minute.
    """
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(guard, timeout=PATIENCE))
        except Timeout:
            # Where a drive knows no locks, the file itself is the lock, and a killed process leaves it for ever.
            raise IdgenError(
                f"{guard} has been locked by another program for {PATIENCE:g} s. Stop that one and run again; if there "
                "is none, a killed one has left the file: delete it."
            ) from None
        yield


class LockFile:
    """The JSON file of records, by entry name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Record]:
        """All records.

        Raises:
            BadWeights: the file is damaged.
        """
        try:
            tables = json.loads(self.path.read_text(encoding="utf-8"))["entries"]
            return {name: Record(**table) for name, table in tables.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadWeights(
                f"{self.path} is damaged ({error}). Delete it; idgen weights pull records the files anew."
            ) from None

    def get(self, name: str) -> Record | None:
        """The record of one entry, or None."""
        return self.read().get(name)

    def put(self, name: str, record: Record | None) -> None:
        """Write (or with None remove) a record. Safe against other processes that write at the same time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with alone(self.path.with_name(f".{self.path.name}.guard")):
            records = self.read()
            if record is None:
                records.pop(name, None)
            else:
                records[name] = record
            tables = {key: asdict(records[key]) for key in sorted(records)}
            text = json.dumps({"format": 1, "entries": tables}, indent=1)
            draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            draft.write_text(text + "\n", encoding="utf-8")
            draft.replace(self.path)


def search(entry: Entry, folder: Path, record: Record | None, commit: str | None = None) -> Located | None:
    """The files of an entry in a folder of repository layout, or None if any is missing.

    With a record these are the recorded files. Without, every named file must be there, and every pattern must match.
    """
    if not folder.is_dir():
        return None
    if record is not None:
        names = tuple(record.files)
        covered = all(any(fnmatchcase(name, pattern) for name in names) for pattern in entry.files)
        complete = covered and all((folder / name).is_file() for name in names)
        return Located(folder, names, commit) if complete else None
    names = ()
    for pattern in entry.files:
        if "*" in pattern:
            hits = sorted(p.relative_to(folder).as_posix() for p in folder.glob(pattern) if p.is_file())
        else:
            hits = [pattern] if (folder / pattern).is_file() else []
        if not hits:
            return None
        names += tuple(hits)
    return Located(folder, tuple(dict.fromkeys(names)), commit)


def search_hub_cache(entry: Entry, record: Record | None) -> Located | None:
    """The files of an entry in the Hugging Face cache, without any network, or None.

    The layout (models--owner--name/{refs,snapshots}) is the documented one of huggingface_hub. Several entries share
    a repository, so the newest commit known may hold only some: any snapshot that is complete will do.
    """
    from huggingface_hub import constants

    if entry.repo is None:
        return None
    home = Path(constants.HF_HUB_CACHE) / ("models--" + entry.repo.replace("/", "--"))
    snapshots = home / "snapshots"
    if not snapshots.is_dir():
        return None
    commits: list[str] = []
    if record is not None and record.commit:
        commits.append(record.commit)
    else:
        wanted = entry.revision or "main"
        ref = home.joinpath("refs", *wanted.split("/"))
        commits.append(ref.read_text(encoding="utf-8").strip() if ref.is_file() else wanted)
        if entry.revision is None:
            others = sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
            commits += [path.name for path in others if path.name not in commits]
    for commit in commits:
        found = search(entry, snapshots / commit, record, commit) if re.fullmatch(r"[\w.-]+", commit) else None
        if found is not None:
            return found
    return None


def search_insightface_home(entry: Entry, record: Record | None) -> Located | None:
    """A face pack that insightface itself downloaded before (``~/.insightface/models/NAME``), or None."""
    if entry.kind != "face-pack":
        return None
    home = Path.home() / ".insightface" / "models" / entry.name
    # The nested folder is how the antelopev2 zip unpacks there.
    return search(entry, home, record) or search(entry, home / entry.name, record)
