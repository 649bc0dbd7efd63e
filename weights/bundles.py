"""Carrying weights to a machine without network.

A bundle is a folder, or a zip of one: ``idgen-bundle.json`` (what is in it, with sha256) and ``NAME/...`` for each
entry, its files in the layout of their repository.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from idgen.errors import BadRequest, BadWeights
from idgen.weights.archive import safe_member_path, unzip
from idgen.weights.licences import commercial_only, refuse_if_not_commercial, require_acceptance
from idgen.weights.manifest import Entry, get_entry, load_manifest, with_needs
from idgen.weights.records import make_record, search, sha256_of
from idgen.weights.store import Store

INDEX = "idgen-bundle.json"
BUNDLE_MAX_BYTES = 1 << 42  # bytes; a bundle may hold several base models


def bundle(store: Store, names: list[str], out: Path, *, needs: bool = True) -> Path:
    """Copy entries (and what they need) from the store to ``out``: a new folder, or a zip if it ends in ``.zip``.

    Raises:
        BadRequest: no names, or ``out`` exists already.
        WeightsMissing: an entry is not on this machine.
        BadWeights: a file differs from its record.
    """
    if not names:
        raise BadRequest("name the weights to bundle, see: idgen weights list", field="names")
    if out.exists():
        raise BadRequest(f"{out} is already there: give another name.", field="out")
    entries = with_needs(names) if needs else [get_entry(name) for name in dict.fromkeys(names)]
    index: dict[str, Any] = {"format": 1, "entries": {}}
    sources: list[tuple[Path, str]] = []
    for entry in entries:
        store.path(entry.name)  # raises WeightsMissing with the command
        found, old = store.locate(entry.name), store.lock.get(entry.name)
        assert found is not None
        record = make_record(entry, found)
        store.settle(entry, record, old)
        index["entries"][entry.name] = {
            "source": entry.source,
            "licence": entry.licence,
            "commit": record.commit,
            "files": record.files,
        }
        sources += [(found.root / file, f"{entry.name}/{file}") for file in found.files]
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.part")
    _delete(draft)  # left by a process that was killed
    try:
        if out.suffix.lower() == ".zip":
            with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as target:  # weights do not compress
                target.writestr(INDEX, json.dumps(index, indent=1))
                for path, member in sources:
                    target.write(path.resolve(), member)
        else:
            for path, member in sources:
                copy = draft / member
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            (draft / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        draft.replace(out)
    finally:
        _delete(draft)
    return out


def add(store: Store, path: Path, name: str | None = None, accept_licence: bool = False) -> list[str]:
    """Copy weights into the store.

    Args:
        store: where to.
        path: a bundle (folder or zip); or one entry's own file, folder or zip, as downloaded by other means.
        name: which entry it is; for a bundle the one entry to take. Default: all of a bundle, or told by the file name.
        accept_licence: the user accepts restricted or unclear licences.

    Returns:
        The names added.

    Raises:
        BadRequest: there is no such file, or it is not clear which weights it is.
        BadWeights: a file is damaged, missing, hostile, or differs from what was first recorded.
        LicenceRefused: a licence is not accepted, or ruled out by ``IDGEN_COMMERCIAL_ONLY``.
    """
    if not path.exists():
        raise BadRequest(f"there is nothing at {path}.", field="path")
    if path.is_dir():
        if (path / INDEX).is_file():
            return _add_bundle(store, path, name, accept_licence)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            is_bundle = INDEX in archive.namelist()
        if is_bundle:
            with store.staging() as staging:
                unzip(path, staging / "bundle", max_bytes=BUNDLE_MAX_BYTES, strip_top=False)
                return _add_bundle(store, staging / "bundle", name, accept_licence)
    entry = get_entry(name) if name else _guess(path)
    _check_licences([entry], accept_licence)
    with store.staging() as staging:
        content = staging / "content"
        _lay_out(entry, path, content)
        store.install(entry, content, store.lock.get(entry.name))
    return [entry.name]


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _check_licences(entries: list[Entry], accepted: bool) -> None:
    if commercial_only() and any(entry.commercial is not True for entry in entries):
        refuse_if_not_commercial([entry.name for entry in entries])
    require_acceptance(entries, accepted)


def _guess(path: Path) -> Entry:
    """The entry that a file or folder is, by its name."""
    fits = [
        entry
        for entry in load_manifest().values()
        if (path.is_dir() and path.name == entry.name)
        or (path.is_file() and entry.is_single_file and path.name == entry.files[0].rsplit("/", 1)[-1])
        or (path.is_file() and entry.url and path.name == entry.url.rsplit("/", 1)[-1])
    ]
    if len(fits) != 1:
        which = f"It could be {' or '.join(entry.name for entry in fits)}. " if fits else ""
        raise BadRequest(f"which weights is {path}? {which}Say it with --name NAME (idgen weights list).", field="name")
    return fits[0]


def _lay_out(entry: Entry, path: Path, content: Path) -> None:
    """Copy a file, folder or zip to ``content`` in the layout of the entry's repository."""
    if path.is_dir():
        root = path
        # The folder may be the repository, or already the deepest folder of the entry, or (a pack) nested once.
        for place, prefix in ((path, ""), (path, entry.folder), (path / path.name, "")):
            root = place
            wanted = [pattern[len(prefix) :].lstrip("/") for pattern in entry.files]
            if all(any(root.glob(pattern)) for pattern in wanted):
                break
        else:
            missing = [pattern for pattern in entry.files if not any(path.glob(pattern))]
            raise BadWeights(f"{path} is not {entry.name}: it has no {', '.join(missing)}.")
        for pattern in wanted:
            for file in (hit for hit in root.glob(pattern) if hit.is_file()):
                target = content / prefix / file.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    elif zipfile.is_zipfile(path) and entry.url:
        unzip(path, content)
    elif entry.is_single_file:
        target = content / entry.files[0]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    elif entry.url:
        raise BadWeights(f"{path} is not a whole zip file. Download it again from {entry.url}")
    else:
        raise BadRequest(f"{entry.name} is several files: give the folder that holds {', '.join(entry.files[:3])}.")


def _add_bundle(store: Store, folder: Path, name: str | None, accept_licence: bool) -> list[str]:
    index = folder / INDEX
    try:
        tables = json.loads(index.read_text(encoding="utf-8"))["entries"]
        commits = {key: table.get("commit") for key, table in tables.items()}
        claims = {
            key: {safe_member_path(file).as_posix(): facts["sha256"] for file, facts in table["files"].items()}
            for key, table in tables.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadWeights(f"{index} is damaged ({error}). Make the bundle again: idgen weights bundle") from None
    if name is not None and name not in claims:
        raise BadRequest(f"this bundle has no {name!r}; it has {', '.join(claims)}.", field="name")
    entries = [get_entry(key) for key in claims if name in (None, key)]
    _check_licences(entries, accept_licence)
    for entry in entries:
        source = folder / entry.name
        with store.staging() as staging:
            content = staging / "content"
            for file, sha256 in claims[entry.name].items():
                if not entry.matches(file):
                    raise BadWeights(f"{index}: {file} is not one of the files of {entry.name}.")
                if not (source / file).is_file() or (source / file).is_symlink():
                    raise BadWeights(f"the bundle lacks {entry.name}/{file}. Copy it again.")
                target = content / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, target)
                if sha256_of(target) != sha256:
                    raise BadWeights(f"the bundle's {entry.name}/{file} is damaged. Copy it again.")
            if search(entry, content, None) is None:
                raise BadWeights(f"the bundle's {entry.name} is incomplete. Make it again: idgen weights bundle")
            store.install(entry, content, store.lock.get(entry.name), commits[entry.name])
    return [entry.name for entry in entries]
