"""Where weights are on this machine, and how they get there.

Files from the Hugging Face hub stay in its own cache, shared with every other program. What comes from elsewhere (face
packs, bundles) lies in ``ROOT/models/NAME``, so that insightface's ``FaceAnalysis(name, root=ROOT)`` finds its packs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from idgen.errors import BadWeights, WeightsMissing
from idgen.weights import fetch, records
from idgen.weights.archive import unzip
from idgen.weights.checks import Check, how_to_repair, verify_blob, verify_recorded
from idgen.weights.licences import (
    accept_flag,
    commercial_only,
    not_commercial,
    refuse_if_not_commercial,
    require_acceptance,
)
from idgen.weights.manifest import Entry, get_entry, load_manifest, with_needs
from idgen.weights.records import Located, LockFile, Record, make_record

__all__ = ["Check", "Store", "commercial_only", "mini_dir", "not_commercial", "refuse_if_not_commercial"]

STALE = 2 * 86_400  # seconds after which work in progress belongs to a process that was killed


def mini_dir() -> Path | None:
    """The folder of the small model set that ships with the package, or None if this installation has none."""
    folder = Path(__file__).with_name("mini")
    return folder if folder.is_dir() and any(folder.iterdir()) else None


class Store:
    """The weights of this machine.

    Args:
        root: where idgen keeps what is not in the Hugging Face cache. Default: ``IDGEN_HOME``, else the user's data
            folder of the platform.
    """

    commercial_only = staticmethod(commercial_only)
    refuse_if_not_commercial = staticmethod(refuse_if_not_commercial)

    def __init__(self, root: Path | str | None = None) -> None:
        if root is None:
            root = os.environ.get("IDGEN_HOME") or None
        if root is None:
            from platformdirs import user_data_dir

            root = user_data_dir("idgen", appauthor=False)
        self.root = Path(root).expanduser().absolute()
        self.lock = LockFile(self.root / "weights.lock.json")

    # --- looking ---

    def locate(self, name: str) -> Located | None:
        """Where the files of an entry are, or None if any is missing. Uses no network.

        Raises:
            BadRequest: no entry has this name.
        """
        return self._locate(get_entry(name), self.lock.get(name))

    def has(self, name: str) -> bool:
        """Whether all files of an entry are on this machine."""
        return self.locate(name) is not None

    def path(self, name: str) -> Path:
        """The file of a single-file entry, else the folder that contains its files in the repository's layout.

        Raises:
            BadRequest: no entry has this name; the message suggests the nearest.
            WeightsMissing: it is not here; the message names the command that gets it.
            BadWeights: a file has another size than at its first download.
        """
        entry, record = get_entry(name), self.lock.get(name)
        found = self._locate(entry, record)
        if found is None:
            raise WeightsMissing(
                f"{name} is not on this machine. Get it with: idgen weights pull {name}{accept_flag(name)}"
            )
        for file, facts in (record.files if record else {}).items():
            # Sizes only: hashing gigabytes at every start would be felt. `verify` does that.
            if (found.root / file).stat().st_size != facts["size"]:
                raise BadWeights(f"{name}: {found.root / file} is damaged. {how_to_repair(entry)}")
        return found.root / (entry.files[0] if entry.is_single_file else entry.folder)

    def hashes(self, name: str) -> dict[str, str]:
        """The recorded sha256 of every file of an entry, by relative path; empty if never recorded."""
        record = self.lock.get(name)
        return record.sha256() if record else {}

    def present(self) -> list[str]:
        """The names of all entries that are on this machine."""
        known = self.lock.read()
        return [name for name, entry in load_manifest().items() if self._locate(entry, known.get(name))]

    # --- getting ---

    def pull(
        self,
        name: str,
        accept_licence: bool = False,
        progress: bool = True,
        *,
        needs: bool = True,
        force: bool = False,
        update: bool = False,
    ) -> Path:
        """Get an entry and (with ``needs``) all that it needs. What is here already is left alone.

        Args:
            name: an entry of the manifest.
            accept_licence: the user accepts restricted or unclear licences.
            progress: show progress bars on stderr.
            needs: pull what it needs, too.
            force: download again, to repair damaged files; the result must equal what was first recorded.
            update: take what the source has now, and record it anew.

        Returns:
            ``path(name)``.

        Raises:
            LicenceRefused: a licence is not accepted, or ruled out by ``IDGEN_COMMERCIAL_ONLY``.
            WeightsMissing: no network, no room, or gone from its source.
            BadWeights: the download is damaged, hostile, or differs from what was first recorded.
        """
        entries = with_needs([name]) if needs else [get_entry(name)]
        if commercial_only() and any(entry.commercial is not True for entry in entries):
            refuse_if_not_commercial([entry.name for entry in entries])
        known = self.lock.read()
        here = {entry.name: self._locate(entry, known.get(entry.name)) for entry in entries}
        again = {name} if force or update else set()
        wanted = [entry for entry in entries if here[entry.name] is None or entry.name in again]
        require_acceptance(wanted, accept_licence)
        fetch.refuse_if_no_room(wanted, self.root)
        for entry in entries:
            found, record = here[entry.name], known.get(entry.name)
            if entry in wanted:
                get = self._pull_zip if entry.url else self._pull_hub
                get(entry, None if update and entry.name == name else record, entry.name in again, progress)
            elif found is not None and record is None:
                self.lock.put(entry.name, make_record(entry, found))
        if not wanted:
            return self.path(name)
        with self._one_at_a_time():  # another process that pulls the same may be between the old folder and the new one
            return self.path(name)

    def add(self, path: Path | str, name: str | None = None, accept_licence: bool = False) -> list[str]:
        """Take weights from a file, folder or bundle on this machine; see ``idgen.weights.bundles.add``."""
        from idgen.weights import bundles

        return bundles.add(self, Path(path), name, accept_licence)

    def bundle(self, names: Iterable[str], out: Path | str, *, needs: bool = True) -> Path:
        """Copy weights to a folder or zip for a machine without network; see ``idgen.weights.bundles.bundle``."""
        from idgen.weights import bundles

        return bundles.bundle(self, list(names), Path(out), needs=needs)

    def remove(self, name: str) -> bool:
        """Forget an entry's record and delete idgen's own copy; the Hugging Face cache is left alone.

        Returns:
            Whether there was anything to remove.
        """
        entry = get_entry(name)
        own = self.own_folder(entry)
        known = self.lock.get(name) is not None
        if known:
            self.lock.put(name, None)
        if not own.exists():
            return known
        self._discard(own)
        return True

    # --- checking ---

    def verify(self, name: str | None = None) -> list[Check]:
        """Hash every file and compare with the record of its first download.

        Args:
            name: one entry, or None for all that are recorded or present.

        Raises:
            WeightsMissing: the entry is neither here nor recorded.
        """
        known = self.lock.read()
        if name is not None:
            entries = [get_entry(name)]
        else:
            entries = [entry for entry in load_manifest().values() if entry.name in known or self._locate(entry, None)]
        checks: list[Check] = []
        for entry in entries:
            record = known.get(entry.name)
            found = self._locate(entry, record)
            if record is not None:
                checks += verify_recorded(entry, record, found.root if found else self._partly(entry, record))
            elif found is not None:
                checks += [verify_blob(entry, found, file) for file in found.files]
            else:
                self.path(entry.name)  # raises WeightsMissing with the command
        return checks

    # --- inside ---

    def own_folder(self, entry: Entry) -> Path:
        """Where idgen's own copy of an entry lies, if it has one."""
        return self.root / "models" / entry.name

    def _locate(self, entry: Entry, record: Record | None) -> Located | None:
        return (
            records.search(entry, self.own_folder(entry), record, record.commit if record else None)
            or records.search_hub_cache(entry, record)
            or records.search_insightface_home(entry, record)
        )

    def _partly(self, entry: Entry, record: Record) -> Path | None:
        """The folder that holds what is left of an entry of which files are missing."""
        if self.own_folder(entry).is_dir():
            return self.own_folder(entry)
        for file, facts in record.files.items():
            one = Record(record.source, record.commit, record.recorded, {file: facts})
            found = self._locate(entry, one)
            if found is not None:
                return found.root
        return None

    def _pull_hub(self, entry: Entry, record: Record | None, force: bool, progress: bool) -> None:
        revision = (record.commit if record else None) or entry.revision
        found = fetch.fetch_hub(entry, revision, force=force, progress=progress)
        # An own copy (from a bundle) would hide what was just downloaded.
        self._discard(self.own_folder(entry))
        self.settle(entry, make_record(entry, found), record)

    def _pull_zip(self, entry: Entry, record: Record | None, force: bool, progress: bool) -> None:
        with self.staging() as staging:
            fetch.fetch_zip(entry, staging / "download.zip", progress=progress)
            unzip(staging / "download.zip", staging / "content")
            self.install(entry, staging / "content", record)

    def install(self, entry: Entry, content: Path, record: Record | None, commit: str | None = None) -> None:
        """Move a folder of repository layout into place, if it is complete and equals the record (if any)."""
        found = records.search(entry, content, None, commit)
        if found is None:
            missing = [pattern for pattern in entry.files if not any(content.glob(pattern))]
            raise BadWeights(f"{entry.name}: {', '.join(missing)} is not in what came from {entry.source}.")
        new = make_record(entry, found)
        _refuse_difference(entry, record, new)
        own = self.own_folder(entry)
        own.parent.mkdir(parents=True, exist_ok=True)
        with self.staging() as aside, self._one_at_a_time():
            if own.exists():
                own.replace(aside / "old")
            content.replace(own)
        self.settle(entry, new, record)

    def settle(self, entry: Entry, new: Record, old: Record | None) -> None:
        """Write the record of a first download; hold every later one to it.

        Raises:
            BadWeights: the files differ from the record.
        """
        _refuse_difference(entry, old, new)
        if old is None or old.files != new.files:  # more files: a newer manifest names some that the old one did not
            self.lock.put(entry.name, new)

    def _discard(self, folder: Path) -> None:
        """Make a folder vanish at once, and only then delete it file by file."""
        with self.staging() as aside, self._one_at_a_time():
            if folder.exists():
                folder.replace(aside / "old")

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Hold off other processes that install into this store."""
        with records.alone(self.root / ".install.guard"):
            yield

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder on the store's own volume for work in progress; gone afterwards, unless the process is killed."""
        self.root.mkdir(parents=True, exist_ok=True)
        for stale in self.root.glob(".staging-*"):
            with suppress(OSError):  # another process may be sweeping, too
                if time.time() - stale.stat().st_mtime > STALE:
                    shutil.rmtree(stale, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=self.root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _refuse_difference(entry: Entry, old: Record | None, new: Record) -> None:
    if old is None:
        return
    changed = [file for file, sha256 in old.sha256().items() if new.sha256().get(file) != sha256]
    if changed:
        raise BadWeights(
            f"{entry.name}: {', '.join(changed)} differs from what was first downloaded on {old.recorded[:10]}. "
            f"If you trust the new files: idgen weights pull {entry.name} --update   "
            f"(for files added by hand, first: idgen weights remove {entry.name})"
        )
