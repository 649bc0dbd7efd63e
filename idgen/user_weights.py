"""A user's own LoRAs and textual inversions: clear errors where they are not there, or are something else, and what a
portrait says of them, so that it is never rendered again without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idgen.base_loading import first_line
from idgen.errors import BadImage, BadWeights, WeightsMissing
from idgen.provenance import hash_weights

if TYPE_CHECKING:
    from idgen.backbone import Backbone

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_HUB = ("huggingface_hub", "httpx", "httpx2", "requests", "urllib3")
"""packages whose errors say that something could not be fetched; which of them diffusers uses depends on its version"""


@dataclass(frozen=True)
class UserWeights:
    """A LoRA or an embedding that a user has loaded."""

    kind: str
    """``lora`` or ``embedding``"""
    source: str
    """an absolute path, or a hub id"""
    sha256: str | None
    """of the file or folder; ``None``: from the hub"""
    scale: float = 1.0
    """LoRA: its weight"""
    token: str | None = None
    """embedding: the word that stands for it, where it is not the file's own"""

    @classmethod
    def of(cls, kind: str, source: str | Path, scale: float = 1.0, token: str | None = None) -> UserWeights:
        """What is known of weights that were just loaded."""
        path = Path(source)
        if not path.exists():
            return cls(kind, str(source), None, scale, token)
        return cls(kind, str(path.resolve()), hash_weights(path), scale, token)

    def load(self, backbone: Backbone) -> None:
        """Load them once more. Raises as :meth:`~idgen.backbone.Backbone.load_lora` does."""
        if self.kind == "lora":
            backbone.load_lora(self.source, self.scale)
        else:
            backbone.load_embedding(self.source, self.token)

    def check(self, portrait: str) -> None:
        """See that they are those that ``portrait`` was made with, before any model is loaded.

        Raises:
            WeightsMissing: the file is no longer there, or is another.
        """
        if self.sha256 is None:
            return
        path = Path(self.source)
        if not path.exists() or hash_weights(path) != self.sha256:
            cure = f"give it with --lora FILE:{self.scale:g}, or put" if self.kind == "lora" else "put"
            raise WeightsMissing(
                f"{portrait} was made with the {self.kind} {self.source} (sha256 {self.sha256[:12]}...), "
                f"{'which has changed since' if path.exists() else 'which is not there'}: {cure} it back."
            )


def recorded(data: dict[str, Any], portrait: str) -> list[UserWeights]:
    """The user's weights that a portrait's metadata name.

    Args:
        portrait: what to call it in a message.
    Raises:
        BadImage: the record is damaged.
    """
    try:
        found = [UserWeights(**each) for each in data.get("user_weights", [])]
        if not all(
            each.kind in ("lora", "embedding")
            and isinstance(each.source, str)
            and isinstance(each.sha256, str | None)
            and isinstance(each.scale, int | float)
            and isinstance(each.token, str | None)
            for each in found
        ):
            raise TypeError
    except TypeError:
        raise BadImage(f"{portrait} carries idgen metadata that is not whole: 'user_weights' is damaged.") from None
    return found


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
