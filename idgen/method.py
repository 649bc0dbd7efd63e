"""What a method is: the base class of everything in ``pipelines/`` and of third parties' own methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from idgen.caches import TensorCache
from idgen.errors import BadRequest

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from idgen.backbone import Backbone
    from idgen.conditioning import Conditioning, TextTokens
    from idgen.identity import Identity
    from idgen.request import Request


@dataclass(frozen=True)
class Defaults:
    """A method's values for the fields that a request leaves open; the authors' own where they named any."""

    steps: int = 30
    guidance: float = 7.5
    identity_scale: float = 1.0
    structure_scale: float = 1.0
    scheduler: str | None = None
    prompt: str = ""
    negative_prompt: str | None = ""
    size: tuple[int, int] | None = None
    """(width, height) in pixels; ``None`` takes the base's own size."""


MINI_DEFAULTS: dict[str, Any] = {
    "steps": 20,
    "guidance": 2.5,
    "identity_scale": 1.0,
    "structure_scale": 1.0,
    "scheduler": None,
    "prompt": "a photo of a person",
    "negative_prompt": "",
}
"""What differs on the mini bases, whatever the method: they were trained with v-prediction on captions of their own.
2.5 is the guidance with the most likeness on validation people among 2, 2.5, 3 and 3.5; prompts are obeyed alike."""


@dataclass(frozen=True)
class Weight:
    """Where one weight of a method lies: an entry of the manifest, and the file or folder inside it."""

    entry: str
    inside: tuple[str, ...] = ()
    """Alternatives, the first that exists is taken; empty for the entry itself."""


@dataclass(frozen=True, eq=False)
class Order:
    """A request with everything decided: no field is open any more. It makes ``len(seeds)`` images."""

    request: Request
    identity: Identity | None
    embedding: np.ndarray | None
    """The raw embedding [512] or [k, 512] by the recogniser that the method was trained on which reads this order."""
    pictures: tuple[Image.Image, ...]
    """What the image encoder sees, for methods that take whole pictures; empty where every method reads a face."""
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    guidance: float
    identity_scale: float
    structure_scale: float
    seeds: tuple[int, ...]
    scheduler: str | None
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
    """Where methods are combined: what each after the first that reads a face reads instead of ``embedding``, by its
    name."""

    def read_by(self, method: str) -> Order:
        """The order as a method sees it, by its name: with the embedding of its own recogniser."""
        return replace(self, embedding=self.embeddings[method]) if method in self.embeddings else self

    @property
    def guided(self) -> bool:
        """Whether the unconditional half is computed."""
        return self.guidance > 1.0


@dataclass(frozen=True, eq=False)
class Files:
    """Paths of a method's weights by role, and the options it was loaded with."""

    paths: dict[str, Path]
    options: dict[str, Any] = field(default_factory=dict)


class Method(ABC):
    """A thin composition of adapters. A subclass says what it needs and builds conditioning; it never samples.

    Subclass attributes describe the method before any weight is loaded.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    weights: ClassVar[dict[str, dict[str, Weight]]]
    """base name (``sdxl``, ``sd15``, ``mini-xl``, ``mini-sd15``) -> role -> weight"""
    recogniser: ClassVar[dict[str, str]] = {}
    """base name -> manifest entry of the face pack or recogniser whose embedding it was trained on; empty: no face"""
    detector: ClassVar[str | None] = None
    """manifest entry of the face pack that finds the face, where ``recogniser`` is a bare recogniser"""
    each_photo: ClassVar[bool] = False
    """Whether several photos are kept as several embeddings [k, 512] rather than averaged."""
    defaults: ClassVar[Defaults] = Defaults()
    options: ClassVar[dict[str, Any]] = {}
    """Settings fixed at load time, with their defaults."""
    speaks_text: ClassVar[bool] = False
    """Whether :meth:`text` is this method's own, replacing the prompt."""

    def __init__(self, backbone: Backbone, files: Files) -> None:
        self.backbone = backbone
        self.files = files
        self.cache = TensorCache()
        """Identity tokens kept across requests, so that the same person with another prompt or seed costs nothing. Keys
        name the content of what went in, every setting that matters, and the state of the weights."""
        unknown = set(files.options) - set(self.options)
        if unknown:
            known = ", ".join(self.options) or "none"
            raise BadRequest(f"{self.name} has no option {sorted(unknown)[0]!r}; it has: {known}.", sorted(unknown)[0])
        self.option = {**self.options, **files.options}

    @classmethod
    def defaults_on(cls, base: str) -> Defaults:
        """Its defaults on a base, by the base's name."""
        return replace(cls.defaults, **MINI_DEFAULTS) if base.startswith("mini-") else cls.defaults

    @classmethod
    def bases(cls) -> tuple[str, ...]:
        """The base names it has weights for."""
        return tuple(cls.weights)

    @abstractmethod
    def condition(self, orders: list[Order]) -> Conditioning:
        """Build the conditioning of one sampler run.

        Args:
            orders: all of one size, number of steps, guidance and scheduler; they may differ in everything else.
        Returns:
            B rows, the images of the first order first.
        """

    def text(self, orders: list[Order]) -> TextTokens:
        """The prompts of all orders as text tokens; methods that speak through the text channel override this."""
        import torch

        from idgen.conditioning import TextTokens
        from idgen.text import encode_negative, encode_prompt, pad_together

        backbone = self.backbone
        positive = [encode_prompt(backbone, order.prompt) for order in orders for _ in order.seeds]
        guided = orders[0].guided
        negative = [encode_negative(backbone, o.negative_prompt) for o in orders for _ in o.seeds] if guided else []
        together = pad_together(positive + negative, backbone)
        halves = [together[: len(positive)], together[len(positive) :] if guided else None]
        if backbone.family != "sdxl":
            return TextTokens(halves[0], halves[1])  # type: ignore[arg-type]
        ids = [[o.height, o.width, 0, 0, o.height, o.width] for o in orders for _ in o.seeds]
        return TextTokens(
            halves[0],  # type: ignore[arg-type]
            halves[1],
            torch.cat([item.pooled for item in positive]),  # type: ignore[misc]
            torch.cat([item.pooled for item in negative]) if guided else None,  # type: ignore[misc]
            torch.tensor(ids, dtype=torch.float32),
        )


def unit(embedding: np.ndarray) -> np.ndarray:
    """Rows of length 1: [512] or [k, 512]."""
    import numpy as np

    return embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)


def per_image(orders: list[Order], rows: Iterable[Tensor]) -> Tensor:
    """One row (1, ...) for each order, repeated for each of its images: (B, ...)."""
    import torch

    return torch.cat([row.repeat_interleave(len(order.seeds), 0) for order, row in zip(orders, rows)])


def scales(orders: list[Order], value: Callable[[Order], float]) -> Tensor:
    """A number for each image, (B,)."""
    import torch

    return torch.tensor([value(order) for order in orders for _ in order.seeds], dtype=torch.float32)
