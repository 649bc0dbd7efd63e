"""Where a batch reads and writes: a local folder, or a bucket through fsspec. Nothing half-written is ever visible."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from idgen.errors import BadRequest, IdgenError

PART = ".idgen-part-"
"""Prefix of files being written. What a killed process left under it is swept by the next run."""
LOG = "results.jsonl"


class DiskFull(IdgenError):
    """The output folder takes no more data. Everything finished before is kept; the same command goes on."""


class Folder(Protocol):
    """The output of a batch."""

    name: str

    def has(self, file: str) -> bool:
        """Whether a file of that name is there and not empty."""

    def write(self, file: str, data: bytes) -> None:
        """Write a file in one step: it is there whole, or not at all. Raises `DiskFull`."""

    def append(self, lines: list[bytes]) -> None:
        """Add lines to the results, durably: they survive a kill right after this returns. Raises `DiskFull`."""

    def log(self) -> Iterator[bytes]:
        """The lines of the results so far, oldest first."""

    def replace_log(self, lines: Iterable[bytes]) -> None:
        """Put these lines in the place of all results so far, in one step. Raises `DiskFull`."""

    def close(self) -> None:
        """Give the folder free for others."""


def is_url(path: object) -> bool:
    """Whether a path names a place that fsspec opens, such as ``s3://bucket/key``."""
    return "://" in str(path)


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem of a URL, and the path in it.

    Raises:
        BadRequest: fsspec or the bucket's own package is not installed.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise BadRequest(
            f"{url} cannot be opened ({error}). Get the client: pip install 'idgen[cluster]' s3fs"
        ) from None


def open_folder(out: str | os.PathLike[str], *, make: bool = True) -> Folder:
    """The output folder `out`, made if it is not there, and taken for this process alone where it is local."""
    return RemoteFolder(str(out)) if is_url(out) else LocalFolder(Path(out), make=make)


class LocalFolder:
    """A folder on this machine (or one that it mounts). One process at a time may write to it."""

    def __init__(self, root: Path, *, make: bool = True) -> None:
        from filelock import FileLock, Timeout

        self.root = root
        self.name = str(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            # The operating system frees the lock when its process dies, so a killed run never blocks the next.
            self._lock = FileLock(root / ".idgen-batch.lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BadRequest(
                f"another batch is writing to {root}. Wait for it, or choose another --out.", "out"
            ) from None
        except OSError as error:
            raise BadRequest(f"cannot write to {root}: {error.strerror or error}.", "out") from None
        for left in root.rglob(f"{PART}*"):
            left.unlink(missing_ok=True)
        self._drop_torn_line()

    def has(self, file: str) -> bool:
        try:
            return (self.root / file).stat().st_size > 0
        except OSError:
            return False

    def write(self, file: str, data: bytes) -> None:
        self._write(self.root / file, [data])

    def append(self, lines: list[bytes]) -> None:
        path, data = self.root / LOG, b"".join(line + b"\n" for line in lines)
        with _disk_full(self.name), path.open("ab", buffering=0) as log:
            size = log.tell()
            try:
                # One write, so that a kill leaves all of it or (on some file systems) a torn end, never a mixture.
                if log.write(data) < len(data):
                    raise OSError(errno.ENOSPC, "only a part was written")
                os.fsync(log.fileno())
            except OSError:
                log.truncate(size)
                raise

    def log(self) -> Iterator[bytes]:
        path = self.root / LOG
        if path.exists():
            with path.open("rb") as file:
                yield from file

    def replace_log(self, lines: Iterable[bytes]) -> None:
        self._write(self.root / LOG, lines)

    def close(self) -> None:
        self._lock.release()

    def _write(self, path: Path, chunks: Iterable[bytes]) -> None:
        part = path.with_name(f"{PART}{uuid.uuid4().hex}")
        with _disk_full(self.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as file:
                    for chunk in chunks:
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def _drop_torn_line(self) -> None:
        path = self.root / LOG
        if not path.exists() or not path.stat().st_size:
            return
        with path.open("rb+") as log:
            end = log.seek(0, os.SEEK_END)
            while end:
                start = max(0, end - 65536)
                log.seek(start)
                newline = log.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            log.truncate(end)


class RemoteFolder:
    """A folder in a bucket. Objects appear whole by themselves; they cannot be appended to, so every call of `append`
    puts an object of its own under ``results/``, which `replace_log` gathers into ``results.jsonl``."""

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self.fs, self.root = filesystem(self.name)
        # A listing made once is wrong as soon as another process has written.
        self.fs.use_listings_cache = False
        self._there: set[str] | None = None

    def has(self, file: str) -> bool:
        if self._there is None:  # one listing instead of a request for each of a million images
            self.fs.invalidate_cache()
            found = self.fs.find(self.root, detail=True) if self.fs.exists(self.root) else {}
            self._there = {
                str(PurePosixPath(path).relative_to(PurePosixPath(self.root)))
                for path, about in found.items()
                if about.get("size", 1)
            }
        return file in self._there

    def write(self, file: str, data: bytes) -> None:
        with _disk_full(self.name):
            self.fs.makedirs(f"{self.root}/{file}".rsplit("/", 1)[0], exist_ok=True)
            self.fs.pipe_file(f"{self.root}/{file}", data)

    def append(self, lines: list[bytes]) -> None:
        import time

        self.write(f"results/{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl", b"".join(x + b"\n" for x in lines))

    def log(self) -> Iterator[bytes]:
        for path in [f"{self.root}/{LOG}", *self._parts()]:
            if self.fs.exists(path):
                with self.fs.open(path, "rb") as file:
                    yield from file

    def replace_log(self, lines: Iterable[bytes]) -> None:
        parts = self._parts()
        with _disk_full(self.name), self.fs.open(f"{self.root}/{LOG}", "wb") as file:
            for line in lines:
                file.write(line)
        for part in parts:  # only now: a kill in between leaves records twice, which reading sorts out
            self.fs.rm_file(part)

    def close(self) -> None:
        pass

    def _parts(self) -> list[str]:
        self.fs.invalidate_cache()
        folder = f"{self.root}/results"
        return sorted(self.fs.find(folder)) if self.fs.exists(folder) else []


class _disk_full:
    """Turn the system's "no space left" and its kin into `DiskFull`; other failures to write into `BadRequest`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        full = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
        if error.errno in full:
            raise DiskFull(
                f"{self.name} is full ({error.strerror or error}). Every finished image is kept: "
                "free some space and run the same command again."
            ) from None
        raise BadRequest(f"cannot write to {self.name}: {error.strerror or error}.", "out") from None
