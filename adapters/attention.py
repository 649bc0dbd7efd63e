"""Attention for every layer of a UNet or ControlNet: what a request brings, and how it gets into the model and out.

The arithmetic is in :mod:`idgen.adapters.processor`. Shapes: B rows (with guidance: the unconditional half first),
N identity tokens, C layer width, D cross-attention width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from idgen.adapters.backends import BACKENDS, attend, check_backend
from idgen.adapters.processor import StreamAttention, region_mask
from idgen.errors import BadWeights

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from torch import nn

__all__ = [
    "BACKENDS",
    "AttentionBank",
    "AttentionState",
    "LoraWeights",
    "Stream",
    "StreamAttention",
    "StreamWeights",
    "attend",
    "attention_layers",
    "check_backend",
]


@dataclass(eq=False)
class StreamWeights:
    """Key and value projections of one token stream, by attention layer number (see :func:`attention_layers`)."""

    key: dict[int, Tensor]
    """layer number -> (C, D)"""
    value: dict[int, Tensor]

    def to(self, device: Any, dtype: Any) -> StreamWeights:
        """The same weights on another device or in another dtype."""
        move = lambda table: {i: w.to(device=device, dtype=dtype) for i, w in table.items()}  # noqa: E731
        return StreamWeights(move(self.key), move(self.value))


@dataclass(eq=False)
class LoraWeights:
    """Low-rank additions to attention projections: ``W x`` becomes ``W x + strength * up(down(x))``.

    ``layers[i][name]`` is ``(down (r, in), up (out, r))`` for ``name`` in ``q, k, v, out``.
    """

    layers: dict[int, dict[str, tuple[Tensor, Tensor]]]
    strength: float = 1.0

    def to(self, device: Any, dtype: Any) -> LoraWeights:
        """The same weights on another device or in another dtype."""
        moved = {
            i: {n: (d.to(device=device, dtype=dtype), u.to(device=device, dtype=dtype)) for n, (d, u) in table.items()}
            for i, table in self.layers.items()
        }
        return LoraWeights(moved, self.strength)


@dataclass(eq=False)
class Stream:
    """One identity token stream as the attention layers see it during one request."""

    weights: StreamWeights
    tokens: Tensor
    """(B, N, D), rows in the order of the UNet batch."""
    scale: Tensor
    """(B, 1, 1) or (1, 1, 1). A tensor, so that a compiled UNet is not recompiled when it changes."""
    region: Tensor | None = None
    """(B or 1, 1, H, W) weights in 0..1, where in the picture the stream acts; any resolution."""
    active: bool = True
    """Set by the sampler step by step; an inactive stream costs nothing."""


@dataclass(eq=False)
class AttentionState:
    """What all layers of one model share during one request."""

    streams: list[Stream] = field(default_factory=list)
    loras: list[LoraWeights] = field(default_factory=list)
    backend: str = "sdpa"
    aspect: float = 1.0
    """Latent width / height, needed to lay a region over a flattened sequence."""
    recording: bool = False
    """Store the input of every self-attention layer, to be used as reference features."""
    reference_rows: slice | None = None
    """The rows of the UNet batch whose self-attention also sees the recorded features."""
    lean: bool = True
    """Read plain projections once and call the processors without diffusers' detour (it inspects a signature at every
    call). Off where torch.compile does this and more."""
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def mask(self, index: int, stream: Stream, length: int) -> Tensor:
        """The region of a stream over a sequence, (B or 1, 1, L, 1); the same for all layers of this length."""
        key = (index, length)
        if key not in self.masks:
            assert stream.region is not None
            self.masks[key] = region_mask(stream.region, length, self.aspect)
        return self.masks[key]


def attention_layers(model: nn.Module) -> list[tuple[str, Attention]]:
    """All attention layers in the numbering of the public adapter files: down blocks, up blocks, mid block.

    Within a transformer block self-attention (even numbers) comes before cross-attention (odd numbers). The order is
    that of ``UNet2DConditionModel.attn_processors``, on which the original IP-Adapter training code enumerated.
    """
    from diffusers.models.attention_processor import Attention

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Attention)]
    rank = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}
    return sorted(layers, key=lambda item: rank.get(item[0].split(".", 1)[0], 3))


class AttentionBank:
    """Puts :class:`StreamAttention` into every attention layer of a model, and takes it out again.

    Use as a context manager: on exit the model carries exactly the processors it had before, no weight was touched and
    no module was added.
    """

    def __init__(self, model: nn.Module, state: AttentionState) -> None:
        self.model = model
        self.state = state
        self.layers = attention_layers(model)
        self.processors = [StreamAttention(i, state) for i in range(len(self.layers))]
        self._before: list[Any] = []
        self._direct: list[Attention] = []

    def check(self) -> None:
        """Raise :class:`BadWeights` when a stream or LoRA does not fit the model's layers, naming the first misfit."""
        for number, (name, attn) in enumerate(self.layers):
            if not attn.is_cross_attention:
                continue
            shape = (attn.inner_dim, attn.cross_attention_dim)
            for stream in self.state.streams:
                for kind, table in (("to_k_ip", stream.weights.key), ("to_v_ip", stream.weights.value)):
                    if number not in table:
                        raise BadWeights(f"the adapter has no '{number}.{kind}.weight' for the layer {name}.")
                    if tuple(table[number].shape) != shape:
                        raise BadWeights(
                            f"'{number}.{kind}.weight' has shape {tuple(table[number].shape)}, but the layer {name} of "
                            f"this base needs {shape}: the adapter was made for another base model."
                        )

    def __enter__(self) -> AttentionBank:
        self.check()
        self._before = [attn.processor for _, attn in self.layers]
        for (_, attn), processor in zip(self.layers, self.processors):
            attn.processor = processor
            # An offloading hook lives in the same place: then its forward stays and finds the processor itself.
            if self.state.lean and "forward" not in attn.__dict__:
                attn.forward = partial(processor, attn)  # type: ignore[method-assign]
                self._direct.append(attn)
        return self

    def prepare(self, context: Tensor) -> None:
        """Compute now, before the first step, what the layers keep for the whole request: a compiled model must not
        find something missing at its first call and there at its second.

        Layers whose weights are elsewhere at the moment (offloading) do it themselves when they are called.

        Args:
            context: (B, T, D), what the cross-attention layers will see.
        """
        for (_, attn), processor in zip(self.layers, self.processors):
            if attn.to_q.weight.device != context.device or hasattr(attn.to_q, "_hf_hook"):
                continue
            if self.state.lean:
                processor.fuse(attn)
            if attn.is_cross_attention:
                processor.prepare(attn, context)

    def __exit__(self, *error: object) -> None:
        for (_, attn), processor in zip(self.layers, self._before):
            attn.processor = processor
        for attn in self._direct:
            del attn.forward
        self._before, self._direct = [], []
        for processor in self.processors:
            processor.clear()
