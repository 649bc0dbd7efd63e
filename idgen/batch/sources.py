"""The files that a prompt file names: where they lie, what is in them, and whether they are good."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from idgen.batch.storage import filesystem, is_url
from idgen.errors import BadImage, BadRequest

IDENTITY = ".safetensors"
FILES = ("who", "image", "mask", "pose", "reference")
"""The fields of a request that may name files."""


def resolve(value: str, base: str) -> str:
    """A path as a prompt file gives it, relative to the file's folder (or bucket) `base`."""
    if is_url(value):
        return value
    if is_url(base) and not Path(value).is_absolute():
        return f"{base.rstrip('/')}/{value}"
    return os.path.normpath(Path(base) / Path(value).expanduser())


@lru_cache(maxsize=65536)
def content(path: str) -> str:
    """sha256 of a file's content, read once a process: another photo under the same name is another request.

    Raises:
        BadImage: there is no such file, or it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        if is_url(path):
            digest.update(read(path))
        else:
            if not Path(path).is_file():  # a pipe would block for ever
                raise FileNotFoundError
            with Path(path).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except FileNotFoundError:
        raise BadImage(f"{path}: there is no such file. Paths are relative to the prompt file's folder.") from None
    except (OSError, ValueError) as error:
        raise BadImage(f"{path} cannot be read ({error}). Check the path and its permissions.") from None
    return digest.hexdigest()


def read(url: str) -> bytes:
    """The content of an object in a bucket."""
    fs, path = filesystem(url)
    return fs.cat_file(path)


def open_source(field: str, value: Any) -> Any:
    """What a request takes in the place of a path: an identity, a photo's bytes, or the path itself.

    Raises:
        BadImage, BadRequest, BadWeights: the file is not there or not what the field needs.
    """
    if isinstance(value, list) and field == "who":
        opened = [open_source(field, each) for each in value]
        from idgen.identity import Identity

        if len(opened) > 1 and any(isinstance(each, Identity) for each in opened):
            raise BadRequest("who: several photos of one person, or one identity file, not both.", "who")
        return opened[0] if len(opened) == 1 else opened
    if not isinstance(value, str):
        return value
    if field == "who" and value.lower().endswith(IDENTITY):
        from idgen.identity import Identity

        return Identity.from_bytes(read(value)) if is_url(value) else Identity.load(value)
    if is_url(value):
        content(value)  # says what is wrong where it is missing
        return read(value)
    return value


def check(field: str, value: Any, extractor: Any = None) -> None:
    """Open a file and decode all of it; with an extractor also find the face that `who` must show.

    Raises:
        BadImage, BadRequest, BadWeights, NoFaceFound: what is wrong with it, and the cure.
    """
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str):
            _check_file(field, each, extractor)


@lru_cache(maxsize=65536)
def _checked(field: str, path: str, extractor: Any) -> Exception | None:
    from idgen.errors import IdgenError
    from idgen.images import open_photo

    try:
        opened = open_source(field, path)
        if field == "who" and not isinstance(opened, str | bytes):
            return None  # an identity: loading it was the check
        if field == "who" and extractor is not None:
            extractor.face(opened)
        else:
            open_photo(opened)
    except IdgenError as error:
        return error
    return None


def _check_file(field: str, path: str, extractor: Any) -> None:
    problem = _checked(field, path, extractor)  # one look at a photo, however many rows name it
    if problem is not None:
        raise type(problem)(*problem.args)


def key(value: Any) -> Any:
    """What tells one person's photos from another's: the files' content."""
    if isinstance(value, str):
        return content(value)
    return tuple(key(each) for each in value) if isinstance(value, list | tuple) else repr(value)


def forget() -> None:
    """Look at all files anew: another batch may find others under the same names."""
    content.cache_clear()
    _checked.cache_clear()
