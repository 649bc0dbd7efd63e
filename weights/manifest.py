"""What weights exist: reads ``manifest.toml`` and checks every entry.

Third parties add their own weights with the environment variable ``IDGEN_MANIFEST``: one or more TOML files of the
same form, separated as in ``PATH``.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from idgen.errors import BadRequest, BadWeights
from idgen.weights.archive import safe_member_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("base", "adapter", "controlnet", "image-encoder", "face-pack", "recogniser", "lora", "vae")
BASES = ("sdxl", "sd15", "any")
MANIFEST = Path(__file__).with_name("manifest.toml")


@dataclass(frozen=True)
class Entry:
    """One named set of weight files.

    Attributes:
        name: what every other part of idgen calls it.
        kind: one of ``KINDS``.
        base: backbone family it goes with: ``sdxl``, ``sd15`` or ``any``.
        files: paths inside the repository or zip, ``/`` separated; ``*`` makes a pattern.
        size_approx: download size in bytes, rounded.
        licence: the terms, in words.
        commercial: whether the terms allow commercial use; ``"unclear"`` where they are missing or contradictory.
        repo: Hugging Face repository, or None where ``url`` is given.
        url: address of a zip, or None where ``repo`` is given.
        revision: branch, tag or commit of the repository; None means its main branch.
        variant: file name variant that diffusers must be asked for (``fp16``).
        needs: names of the entries that it does not run without.
        note: what else a user should know.
    """

    name: str
    kind: str
    base: str
    files: tuple[str, ...]
    size_approx: int
    licence: str
    commercial: bool | Literal["unclear"]
    repo: str | None = None
    url: str | None = None
    revision: str | None = None
    variant: str | None = None
    needs: tuple[str, ...] = ()
    note: str = ""

    @property
    def is_single_file(self) -> bool:
        """True for an entry that is one named file."""
        return len(self.files) == 1 and "*" not in self.files[0]

    @property
    def folder(self) -> str:
        """The deepest folder that contains all files, relative to the repository ('' is its root)."""
        heads = [PurePosixPath(pattern.split("*", 1)[0] + "x").parent.parts for pattern in self.files]
        shared = [step[0] for step in takewhile(lambda step: len(set(step)) == 1, zip(*heads))]
        return "/".join(shared)

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        return self.url or f"https://huggingface.co/{self.repo}"

    def matches(self, path: str) -> bool:
        """Whether ``path`` (relative, ``/`` separated) is one of this entry's files."""
        return any(fnmatchcase(path, pattern) for pattern in self.files)


def load_manifest() -> dict[str, Entry]:
    """All entries by name: those of idgen and those of ``IDGEN_MANIFEST``.

    Raises:
        BadWeights: a manifest cannot be read, or an entry is malformed; the message names the entry and the field.
    """
    return dict(_load(os.environ.get("IDGEN_MANIFEST", "")))


def get_entry(name: str) -> Entry:
    """The entry called ``name``.

    Raises:
        BadRequest: there is none; the message suggests the nearest names.
    """
    entries = load_manifest()
    if name in entries:
        return entries[name]
    near = difflib.get_close_matches(name, entries, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else "See: idgen weights list"
    raise BadRequest(f"no weights are called {name!r}. {hint}", field="name")


def with_needs(names: list[str] | tuple[str, ...]) -> list[Entry]:
    """The entries called ``names`` and everything that they need, each once, needed ones first."""
    found: dict[str, Entry] = {}

    def visit(name: str) -> None:
        if name in found:
            return
        entry = get_entry(name)
        for need in entry.needs:
            visit(need)
        found[name] = entry

    for name in names:
        visit(name)
    return list(found.values())


@lru_cache(maxsize=8)
def _load(extra: str) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for path in [MANIFEST, *(Path(part).expanduser() for part in extra.split(os.pathsep) if part)]:
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadWeights(f"the weights manifest {path} cannot be read ({error}). Check IDGEN_MANIFEST.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadWeights(f"the weights manifest {path} is not valid TOML: {error}") from None
        for name, table in tables.items():
            if name in entries:
                # Overriding would let an extra manifest give a known name other files or another licence.
                raise BadWeights(f"{path}: the name {name!r} is already taken; give your entry another one.")
            entries[name] = _parse(name, table, path)
    for entry in entries.values():
        for need in entry.needs:
            if need not in entries:
                raise BadWeights(f"weights manifest: {entry.name} needs {need!r}, which is no entry.")
        _refuse_cycle(entry.name, entries, ())
    return entries


def _refuse_cycle(name: str, entries: dict[str, Entry], above: tuple[str, ...]) -> None:
    if name in above:
        raise BadWeights(f"weights manifest: entries need each other in a circle: {' -> '.join((*above, name))}.")
    for need in entries[name].needs:
        if need in entries:
            _refuse_cycle(need, entries, (*above, name))


def _parse(name: str, table: Any, path: Path) -> Entry:
    def refuse(why: str) -> BadWeights:
        return BadWeights(f"{path}: entry {name!r}: {why}.")

    def strings(key: str, *, required: bool = False) -> tuple[str, ...]:
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise refuse(f"{key} must be a list of strings")
        if required and not value:
            raise refuse(f"{key} is missing or empty")
        return tuple(value)

    def string(key: str, *, required: bool = False) -> str | None:
        value = table.get(key)
        if value is None and not required:
            return None
        if not isinstance(value, str) or not value:
            raise refuse(f"{key} must be a non-empty string")
        return value

    # The name becomes a folder name, so it must be one on every system.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*", name):
        raise refuse("a name is made of letters, digits, '-', '_' and single dots")
    if not isinstance(table, dict):
        raise refuse("is not a table")
    unknown = set(table) - ({field.name for field in fields(Entry)} - {"name"})
    if unknown:
        raise refuse(f"unknown field {sorted(unknown)[0]!r}")
    kind, base = table.get("kind"), table.get("base")
    if kind not in KINDS:
        raise refuse(f"kind is {kind!r}, not one of {', '.join(KINDS)}")
    if base not in BASES:
        raise refuse(f"base is {base!r}, not one of {', '.join(BASES)}")
    commercial, size = table.get("commercial"), table.get("size_approx")
    if not (isinstance(commercial, bool) or commercial == "unclear"):
        raise refuse('commercial must be true, false or "unclear"')
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise refuse("size_approx must be a positive number of bytes")
    repo, url = string("repo"), string("url")
    if (repo is None) == (url is None):
        raise refuse("give either repo or url")
    if repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise refuse(f"repo {repo!r} is not of the form owner/name")
    if url is not None:
        parts = urlsplit(url)
        local = parts.scheme == "http" and parts.hostname in {"localhost", "127.0.0.1", "::1"}
        if parts.scheme != "https" and not local:
            raise refuse("url must begin with https://")
    files = strings("files", required=True)
    for file in files:
        try:
            clean = str(safe_member_path(file.replace("*", "x")))
        except BadWeights as error:
            raise refuse(f"files: {error}") from None
        if clean != file.replace("*", "x"):
            raise refuse(f"files: {file!r} is not a plain relative path with '/'")
    return Entry(
        name=name,
        kind=kind,
        base=base,
        files=files,
        size_approx=size,
        licence=string("licence", required=True) or "",
        commercial=commercial,
        repo=repo,
        url=url,
        revision=string("revision"),
        variant=string("variant"),
        needs=strings("needs"),
        note=string("note") or "",
    )
