"""The errors that idgen raises on purpose. Each message names the input and the cure."""

from __future__ import annotations


class IdgenError(Exception):
    """Base of every deliberate error. The command line prints its message and exits with code 2."""


class NoFaceFound(IdgenError):
    """A photo holds no face that the detector accepts, or not the one asked for."""


class WeightsMissing(IdgenError):
    """A weight file is not on this machine. The message names the command that gets it."""


class BadWeights(IdgenError):
    """A weight file is not what it claims to be. The message names the first wrong key."""


class BadImage(IdgenError):
    """A photo cannot be read, is too large, or is not an image."""


class BadRequest(IdgenError):
    """A request has a field out of its bounds. ``field`` names it."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class LicenceRefused(IdgenError):
    """A weight's licence was not accepted, or is ruled out by ``IDGEN_COMMERCIAL_ONLY``."""


class OutOfMemory(IdgenError):
    """The device has too little memory for the request. The message names what to lower."""


class Cancelled(IdgenError):
    """The caller asked for the work to stop, and it did."""
