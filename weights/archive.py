"""Unpack a zip from the internet without trusting it.

A zip can name members that climb out of the folder ("../x", "/x", "C:x"), carry symbolic links that point out of it,
claim to be small and unpack to terabytes, or simply be truncated. Everything here refuses first and writes afterwards.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from idgen.errors import BadWeights

CHUNK = 1 << 20  # bytes
MAX_BYTES = 16 << 30  # bytes; the largest single public pack is well under 1 GiB
MAX_MEMBERS = 20_000
MAX_RATIO = 100  # weights hardly compress; 100 is far above any honest pack
RATIO_FREE_BYTES = 64 << 20  # small archives of text may compress better than MAX_RATIO and do no harm

_WINDOWS_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))]
)


def safe_member_path(name: str) -> PurePosixPath:
    """The relative path that a zip member may be written to, the same on Linux, macOS and Windows.

    Backslashes count as separators, because Windows and some zip tools treat them so.

    Raises:
        BadWeights: the name would leave the folder, or means something special on some system.
    """

    def refuse(why: str) -> BadWeights:
        return BadWeights(f"unsafe path {name!r}: {why}")

    if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        raise refuse("it holds control characters")
    path = name.replace("\\", "/")
    if path.startswith("/"):
        raise refuse("it is absolute")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts:
        raise refuse("it is empty")
    for part in parts:
        if part == "..":
            raise refuse("it climbs out of its folder")
        if any(char in part for char in ':*?"<>|'):
            # ":" covers drive letters and NTFS alternate streams; the rest cannot be file names on Windows.
            raise refuse("it holds a character that is special on some systems")
        if part != part.rstrip(" ."):
            raise refuse("it ends in a dot or space, which Windows drops")
        if part.split(".")[0].rstrip(" ").lower() in _WINDOWS_DEVICES:
            raise refuse("it is a device name on Windows")
        if len(part.encode()) > 255:
            raise refuse("it is too long")
    return PurePosixPath(*parts)


def unzip(
    archive: Path,
    into: Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_members: int = MAX_MEMBERS,
    strip_top: bool = True,
    wanted: Callable[[str], bool] | None = None,
) -> list[Path]:
    """Unpack ``archive`` to the new folder ``into``: all of it, or nothing.

    Args:
        archive: the zip file.
        into: a folder that does not exist yet; it appears only once everything is unpacked.
        max_bytes: largest total size when unpacked, in bytes.
        max_members: largest number of members.
        strip_top: drop a single folder that wraps everything (the antelopev2 pack is wrapped in ``antelopev2/``).
        wanted: says by the name inside the zip which members to unpack; default all.

    Returns:
        The files written, sorted.

    Raises:
        BadWeights: the zip is damaged, encrypted, too large, or holds a member that is not a plain file in the folder.
    """
    if into.exists():
        raise BadWeights(f"{into} is already there.")
    into.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{into.name}-", dir=into.parent))
    top = staging / "content"  # mkdtemp's own folder is closed to other users, who may share the weights
    top.mkdir()
    try:
        try:
            with zipfile.ZipFile(archive) as bundle:
                _extract(bundle, archive, _plan(bundle, archive, max_bytes, max_members, wanted), top, max_bytes)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            # RuntimeError: encrypted; NotImplementedError: a compression method that Python lacks.
            raise BadWeights(f"{archive} is not a whole, plain zip file ({error}). Download it again.") from None
        if strip_top:
            children = list(top.iterdir())
            while len(children) == 1 and children[0].is_dir():
                top = children[0]
                children = list(top.iterdir())
        top.replace(into)  # a folder beside the target: on one volume, so the rename is atomic
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sorted(path for path in into.rglob("*") if path.is_file())


def _plan(
    bundle: zipfile.ZipFile,
    archive: Path,
    max_bytes: int,
    max_members: int,
    wanted: Callable[[str], bool] | None,
) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """Judge every member by its header, before a byte is written."""
    infos = bundle.infolist()
    if len(infos) > max_members:
        raise BadWeights(f"{archive} holds {len(infos)} members; at most {max_members} are accepted.")
    plan: list[tuple[zipfile.ZipInfo, PurePosixPath]] = []
    taken: set[str] = set()
    for info in infos:
        # orig_filename: zipfile itself cuts names at a NUL byte, which would hide what follows it.
        path = safe_member_path(info.orig_filename)
        mode = stat.S_IFMT(info.external_attr >> 16)
        if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
            kind = "a symbolic link" if mode == stat.S_IFLNK else "a special file"
            raise BadWeights(f"{archive}: member {info.filename!r} is {kind}; only plain files are accepted.")
        if info.flag_bits & 0x1:
            raise BadWeights(f"{archive}: member {info.filename!r} is encrypted.")
        if info.is_dir() or mode == stat.S_IFDIR:
            continue
        key = unicodedata.normalize("NFC", str(path)).casefold()
        if key in taken:  # the second would silently replace the first on macOS and Windows
            raise BadWeights(f"{archive}: two members are called {str(path)!r}.")
        taken.add(key)
        plan.append((info, path))
    for _, path in plan:
        for parent in path.parents:
            if unicodedata.normalize("NFC", str(parent)).casefold() in taken:
                raise BadWeights(f"{archive}: {str(parent)!r} is both a file and a folder.")
    total = sum(info.file_size for info, _ in plan)
    packed = max(archive.stat().st_size, 1)
    if total > max_bytes:
        raise BadWeights(f"{archive} would unpack to {total} bytes; at most {max_bytes} are accepted.")
    if total > RATIO_FREE_BYTES and total / packed > MAX_RATIO:
        raise BadWeights(f"{archive} would unpack to {total // packed} times its size: it looks like a zip bomb.")
    return [item for item in plan if wanted is None or wanted(item[1].as_posix())]


def _extract(
    bundle: zipfile.ZipFile,
    archive: Path,
    plan: list[tuple[zipfile.ZipInfo, PurePosixPath]],
    folder: Path,
    max_bytes: int,
) -> None:
    left = max_bytes
    for info, path in plan:
        target = folder.joinpath(*path.parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        with bundle.open(info) as source, target.open("xb") as sink:
            while chunk := source.read(CHUNK):  # zipfile checks the CRC at the end
                size += len(chunk)
                left -= len(chunk)
                if left < 0 or size > info.file_size:
                    raise BadWeights(f"{archive}: member {info.filename!r} is larger than it says.")
                sink.write(chunk)
        if size != info.file_size:
            raise BadWeights(f"{archive}: member {info.filename!r} is truncated. Download it again.")
