"""Enrolled identities: kept on disk under random ids, each seen by the key that enrolled it only."""

from __future__ import annotations

import re
import secrets
import threading
import time
from pathlib import Path

from idgen.errors import IdgenError
from idgen.identity import Identity
from idgen.service.errors import ApiError

ID = re.compile(r"idn_[0-9a-f]{24}")


class IdentityShelf:
    """A folder for each owner, a file for each identity. Safe for several threads."""

    def __init__(self, folder: Path | None, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        """Where the files are."""
        if self._folder is None:
            from idgen.weights.store import Store

            self._folder = Store().root / "served-identities"
        return self._folder

    def add(self, owner: str, identity: Identity) -> str:
        """Keep an identity; returns its id.

        Raises:
            ApiError: the owner has as many as may be.
        """
        folder = self.folder / owner
        with self._lock:
            folder.mkdir(parents=True, exist_ok=True)
            if sum(1 for _ in folder.glob("idn_*")) >= self._limit:
                message = f"{self._limit} identities are enrolled, as many as may; delete one first."
                raise ApiError(409, message, "too_many_identities")
            name = f"idn_{secrets.token_hex(12)}"
            identity.save(folder / f"{name}.safetensors")
        return name

    def get(self, owner: str, name: str, param: str = "identity") -> Identity:
        """An identity by its id.

        Raises:
            ApiError: 404, this owner has none of that id.
        """
        path = self._path(owner, name)
        try:
            if path is not None and path.is_file():
                return Identity.load(path)
        except IdgenError:
            if path is not None and path.exists():
                raise
        raise self._unknown(param)

    def created(self, owner: str, name: str) -> int:
        """Unix seconds of the enrolment."""
        path = self._path(owner, name)
        try:
            return int(path.stat().st_mtime) if path is not None else int(time.time())
        except OSError:
            raise self._unknown("identity_id") from None

    def names(self, owner: str) -> list[str]:
        """All ids of an owner, the oldest first."""
        found = []
        for path in (self.folder / owner).glob("idn_*.safetensors"):
            try:
                found.append((path.stat().st_mtime, path.stem))
            except OSError:  # deleted in this moment
                continue
        return [name for _, name in sorted(found)]

    def delete(self, owner: str, name: str) -> None:
        """Forget an identity.

        Raises:
            ApiError: 404, this owner has none of that id.
        """
        path = self._path(owner, name)
        try:
            if path is not None:
                path.unlink()
                return
        except FileNotFoundError:
            pass
        raise self._unknown("identity_id")

    def _path(self, owner: str, name: str) -> Path | None:
        # The pattern keeps a client's text from becoming a path.
        return self.folder / owner / f"{name}.safetensors" if ID.fullmatch(name) else None

    @staticmethod
    def _unknown(param: str) -> ApiError:
        return ApiError(404, "there is no such identity; enrol one with POST /v1/identities.", "not_found", param)
