"""A user's own LoRAs and textual inversions: clear errors where they are not there, or are something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from idgen.base_loading import first_line
from idgen.errors import BadWeights, WeightsMissing

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_HUB = ("huggingface_hub", "httpx", "httpx2", "requests", "urllib3")
"""packages whose errors say that something could not be fetched; which of them diffusers uses depends on its version"""


@contextmanager
def explain_loading(source: str | Path, what: str, family: str) -> Iterator[None]:
    """Within it diffusers loads ``source``: a file, a folder or a hub id.

    Args:
        what: what it should be, with its article: ``"a LoRA"``.
    Raises:
        WeightsMissing: there is no such file, or the hub cannot be asked. BadWeights: it is something else.
    """
    here = Path(source).exists()
    if not here and str(source).lower().endswith(SUFFIXES):
        raise WeightsMissing(f"there is no file {source}; give {what} as a file, a folder or a hub id (owner/name).")
    try:
        yield
    except Exception as error:  # what diffusers, safetensors, pickle and the hub raise shares no base class
        if not here and _not_fetched(error):
            raise WeightsMissing(
                f"{source} is no file here, and could not be fetched from the hub ({first_line(error)}). "
                f"Give a file, or fetch it where there is a network: hf download {source}"
            ) from None
        raise BadWeights(f"{source} is not {what} for this {family} base ({first_line(error)}).") from None


def _not_fetched(error: Exception) -> bool:
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE and isinstance(error, ValueError)  # diffusers asks for a file's name, offline
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or offline or not packages.isdisjoint(_HUB)
