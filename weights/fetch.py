"""Getting weights over the network: through huggingface_hub, or a zip from the web."""

from __future__ import annotations

import contextlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from idgen.errors import BadWeights, WeightsMissing
from idgen.weights.manifest import Entry
from idgen.weights.records import Located, search

CHUNK = 1 << 20  # bytes
TIMEOUT = 60.0  # seconds without a byte


def is_offline() -> bool:
    """Whether the Hugging Face offline switch (``HF_HUB_OFFLINE``) is set; the zips honour it too."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def refuse_if_no_room(entries: list[Entry], store: Path) -> None:
    """Refuse a download that cannot fit on the disk.

    Args:
        entries: what is to be downloaded.
        store: the store's root, where zips are unpacked; the rest goes to the Hugging Face cache.

    Raises:
        WeightsMissing: fewer bytes are free than the entries' approximate sizes.
    """
    from huggingface_hub import constants

    if is_offline():
        return
    from_hub = [entry for entry in entries if entry.repo]
    zips = [entry for entry in entries if entry.url]
    # A zip and what is in it lie side by side for a moment.
    for folder, group, copies in ((Path(constants.HF_HUB_CACHE), from_hub, 1), (store, zips, 2)):
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        size, free = copies * sum(entry.size_approx for entry in group), shutil.disk_usage(folder).free
        if free < size:
            raise WeightsMissing(
                f"{', '.join(entry.name for entry in group)}: the download needs {size / 1e9:.1f} GB, but {folder} has "
                f"{free / 1e9:.1f} GB free. Free some space, or move the folders with HF_HOME and IDGEN_HOME."
            )


def fetch_hub(entry: Entry, revision: str | None, *, force: bool, progress: bool) -> Located:
    """Download an entry into the Hugging Face cache (resumes, keeps what is there already).

    Args:
        entry: an entry with ``repo``.
        revision: branch, tag or commit; None means the main branch.
        force: download even what is in the cache.
        progress: show huggingface_hub's progress bars.

    Raises:
        WeightsMissing: no network, no such repository or file, or access refused.
    """
    import huggingface_hub

    assert entry.repo is not None
    try:
        with _quiet(not progress):
            if entry.is_single_file:
                name = entry.files[0]
                path = Path(huggingface_hub.hf_hub_download(entry.repo, name, revision=revision, force_download=force))
                folder = path.parents[name.count("/")]
            else:
                folder = Path(
                    huggingface_hub.snapshot_download(
                        entry.repo, revision=revision, allow_patterns=list(entry.files), force_download=force
                    )
                )
    except Exception as error:  # hub, HTTP client and socket errors share no base class across its versions
        raise _explain(entry, error) from error
    found = search(entry, folder, None, folder.name)
    if found is None:
        missing = [pattern for pattern in entry.files if not any(folder.glob(pattern))]
        # Without a connection the hub's client hands back whatever part of the repository is in its cache.
        at = f" at revision {revision}" if revision else ""
        raise _explain(entry, FileNotFoundError(f"no {', '.join(missing)} in {entry.repo}{at}, or out of reach"))
    return found


def fetch_zip(entry: Entry, to: Path, *, progress: bool) -> None:
    """Download the zip of an entry to a new file.

    Raises:
        WeightsMissing: no network, or the server refused.
        BadWeights: the answer is shorter than promised, or far larger than the manifest says.
    """
    assert entry.url is not None
    if is_offline():
        raise WeightsMissing(
            f"{entry.name} is not on this machine and HF_HUB_OFFLINE is set. Unset it and run: "
            f"idgen weights pull {entry.name}   or bring a bundle: idgen weights add BUNDLE"
        )
    limit = max(2 * entry.size_approx, 64 << 20)  # the manifest's size is rounded, but not by so much
    request = urllib.request.Request(entry.url, headers={"User-Agent": "idgen"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, to.open("wb") as sink:
            promised = int(answer.headers.get("Content-Length") or 0)
            done = 0
            with _bar(entry.name, promised or entry.size_approx, progress) as advance:
                while chunk := answer.read(CHUNK):
                    done += len(chunk)
                    if done > limit:
                        raise BadWeights(
                            f"{entry.url} sends more than {limit} bytes where about {entry.size_approx} were expected."
                        )
                    sink.write(chunk)
                    advance(len(chunk))
    except urllib.error.HTTPError as error:
        raise WeightsMissing(
            f"{entry.name}: {entry.url} answers {error.code} {error.reason}. Try again later."
        ) from None
    except (OSError, ValueError) as error:
        raise _explain(entry, error) from error
    if promised and done != promised:
        raise BadWeights(
            f"{entry.name}: the download of {entry.url} broke off at {done} of {promised} bytes. "
            f"Run again: idgen weights pull {entry.name}"
        )


def _explain(entry: Entry, error: Exception) -> WeightsMissing:
    kind = type(error).__name__
    first_line = (str(error).strip().splitlines() or [kind])[0][:300]
    if kind == "GatedRepoError":
        cure = f"Accept its terms at {entry.source}, then run: hf auth login"
    elif kind in ("RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "RemoteEntryNotFoundError"):
        cure = f"Check {entry.source}; it may have moved, or be private (hf auth login)."
    elif is_offline():
        cure = f"HF_HUB_OFFLINE is set. Unset it, then: idgen weights pull {entry.name}   or: idgen weights add BUNDLE"
    else:
        cure = (
            "Check the network (and HF_ENDPOINT, if you use a mirror) and run again: "
            f"idgen weights pull {entry.name}   or, without network: idgen weights add BUNDLE"
        )
    return WeightsMissing(f"{entry.name} could not be downloaded from {entry.source} ({kind}: {first_line}). {cure}")


@contextlib.contextmanager
def _quiet(on: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not on or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _bar(title: str, total: int, on: bool) -> Iterator[Callable[[int], None]]:
    if not on:
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.advance(task, size)
