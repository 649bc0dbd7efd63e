"""Attention for every layer of a UNet or ControlNet: text, identity token streams, LoRA and reference features.

One processor class serves all of it. diffusers' own IP-Adapter processors hard-wire one image batch, recompute what
never changes between denoising steps, and are overwritten by its backend switches; this one has none of these faults.

Shapes: B rows (with guidance: the unconditional half first), L query positions, T text tokens, N identity tokens,
C layer width, D cross-attention width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from idgen.errors import BadRequest, BadWeights

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from torch import nn

BACKENDS = ("sdpa", "flash", "cudnn", "efficient", "math", "xformers")


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """Softmax attention with scale 1/sqrt(head width).

    Args:
        q: (B, H, L, d). k, v: (B, H, S, d).
        backend: one of ``BACKENDS``; ``sdpa`` lets torch choose.
    Returns:
        (B, H, L, d).
    """
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        out = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }[backend]
    with sdpa_kernel([kernel, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v)


def check_backend(backend: str) -> str:
    """Return ``backend``, or raise :class:`BadRequest` naming what there is."""
    if backend not in BACKENDS:
        raise BadRequest(f"attention backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}.", "attention")
    if backend == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError:
            raise BadRequest(
                "attention backend 'xformers' needs the xformers package: pip install 'idgen[cuda]'.", "attention"
            ) from None
    return backend


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


class StreamAttention:
    """The processor of one attention layer. Keys and values of text and identity are computed once per request."""

    def __init__(self, number: int, state: AttentionState) -> None:
        self.number = number
        self.state = state
        self.context: Tensor | None = None
        self.text_kv: tuple[Tensor, Tensor] | None = None
        self.stream_kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.masks: dict[tuple[int, int], Tensor] = {}
        self.recorded: Tensor | None = None

    def clear(self) -> None:
        """Forget everything that belongs to one request."""
        self.context = self.text_kv = self.recorded = None
        self.stream_kv.clear()
        self.masks.clear()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """(B, L, C) -> (B, L, C). The interface is diffusers' attention processor."""
        q = self._heads(attn, self._project(attn, "q", hidden_states))
        if encoder_hidden_states is None:
            out = self._self_attention(attn, q, hidden_states)
        else:
            k, v = self._text(attn, encoder_hidden_states)
            out = attend(q, k, v, self.state.backend)
            for index, stream in enumerate(self.state.streams):
                if stream.active:
                    out = out + self._stream(attn, index, stream, q)
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out[1](self._project(attn, "out", out))

    def _heads(self, attn: Attention, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, heads, S, C / heads)."""
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    def _project(self, attn: Attention, name: str, x: Tensor) -> Tensor:
        layer = attn.to_out[0] if name == "out" else getattr(attn, f"to_{name}")
        y = layer(x)
        for lora in self.state.loras:
            pair = lora.layers.get(self.number, {}).get(name)
            if pair is not None:
                y = y + lora.strength * F.linear(F.linear(x, pair[0]), pair[1])
        return y

    def _text(self, attn: Attention, context: Tensor) -> tuple[Tensor, Tensor]:
        if self.text_kv is None or self.context is not context:
            self.context = context
            k, v = self._project(attn, "k", context), self._project(attn, "v", context)
            self.text_kv = (self._heads(attn, k), self._heads(attn, v))
        return self.text_kv

    def _stream(self, attn: Attention, index: int, stream: Stream, q: Tensor) -> Tensor:
        if index not in self.stream_kv:
            k = F.linear(stream.tokens, stream.weights.key[self.number])
            v = F.linear(stream.tokens, stream.weights.value[self.number])
            self.stream_kv[index] = (self._heads(attn, k), self._heads(attn, v))
        k, v = self.stream_kv[index]
        out = attend(q, k, v, self.state.backend) * stream.scale.unsqueeze(-1)
        return out if stream.region is None else out * self._mask(index, stream.region, q.shape[2])

    def _mask(self, index: int, region: Tensor, length: int) -> Tensor:
        """The region at this layer's resolution, (B or 1, 1, L, 1)."""
        if (index, length) not in self.masks:
            height = max(1, round(math.sqrt(length / self.state.aspect)))
            while length % height:
                height -= 1
            mask = F.interpolate(region.float(), (height, length // height), mode="area")
            self.masks[index, length] = mask.flatten(2).unsqueeze(-1).to(region.dtype)
        return self.masks[index, length]

    def _self_attention(self, attn: Attention, q: Tensor, x: Tensor) -> Tensor:
        rows = self.state.reference_rows
        if self.state.recording:
            self.recorded = x
        if rows is None or self.recorded is None or self.state.recording:
            k, v = self._heads(attn, self._project(attn, "k", x)), self._heads(attn, self._project(attn, "v", x))
            return attend(q, k, v, self.state.backend)
        parts = []
        for part, reference in ((slice(0, rows.start), None), (rows, self.recorded)):
            if part.start == part.stop:
                continue
            own = x[part] if reference is None else torch.cat([x[part], reference], dim=1)
            k, v = self._heads(attn, self._project(attn, "k", own)), self._heads(attn, self._project(attn, "v", own))
            parts.append(attend(q[part], k, v, self.state.backend))
        return torch.cat(parts)


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
        return self

    def __exit__(self, *_: object) -> None:
        for (_, attn), processor in zip(self.layers, self._before):
            attn.processor = processor
        self._before = []
        for processor in self.processors:
            processor.clear()
