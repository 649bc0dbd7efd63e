"""The attention processor of idgen: text, identity token streams, LoRA and reference features in one layer.

diffusers' own IP-Adapter processors hard-wire one image batch, recompute what never changes between denoising steps,
and are overwritten by its backend switches; this one has none of these faults.

Shapes: B rows (with guidance: the unconditional half first), L query positions, T text tokens, N identity tokens,
C layer width, D cross-attention width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idgen.adapters.backends import attend
from idgen.adapters.linear import linear

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

    from idgen.adapters.attention import AttentionState, Stream


def is_plain(layer: Any) -> bool:
    """Whether a layer does nothing but its own arithmetic on ordinary weights that lie where they are used.

    A peft layer, a quantised weight, an offloading hook or a user's forward hook all make it not plain; such a layer
    has to be called, its weight must not be read.
    """
    if type(layer) not in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm) or "forward" in layer.__dict__:
        return False
    return type(layer.weight) is nn.Parameter and not (layer._forward_hooks or layer._forward_pre_hooks)


class StreamAttention:
    """The processor of one attention layer. Keys and values of text and identity are computed once per request."""

    def __init__(self, number: int, state: AttentionState) -> None:
        self.number = number
        self.state = state
        self.text_kv: tuple[Tensor, Tensor] | None = None
        self.stream_kv: list[tuple[Tensor, Tensor]] = []
        self.recorded: Tensor | None = None
        self.weight_in: Tensor | None = None
        """Query, key and value projections of a self-attention layer as one (3 C, C); of cross-attention the query."""
        self.weight_out: Tensor | None = None
        self.bias_out: Tensor | None = None

    def clear(self) -> None:
        """Forget everything that belongs to one request."""
        self.forget_text()
        self.stream_kv = []
        self.recorded = self.weight_in = self.weight_out = self.bias_out = None

    def forget_text(self) -> None:
        """The next call brings another context."""
        self.text_kv = None

    def fuse(self, attn: Attention) -> None:
        """Read the projections once: LoRA added to them, a self-attention's three in one. The layer keeps its own."""
        layers: dict[str, Any] = {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v, "out": attn.to_out[0]}
        if not all(is_plain(layer) for layer in layers.values()) or any(
            layers[n].bias is not None for n in ("q", "k", "v")
        ):
            return
        if attn.is_cross_attention:
            self.weight_in = self._with_lora("q", layers["q"].weight)
        else:
            self.weight_in = torch.cat([self._with_lora(n, layers[n].weight) for n in ("q", "k", "v")])
        self.weight_out = self._with_lora("out", layers["out"].weight)
        self.bias_out = layers["out"].bias

    def _with_lora(self, name: str, weight: Tensor) -> Tensor:
        for lora in self.state.loras:
            pair = lora.layers.get(self.number, {}).get(name)
            if pair is not None:
                weight = torch.addmm(weight, pair[1], pair[0], alpha=lora.strength)
        return weight

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
        if encoder_hidden_states is None:
            out = self._self_attention(attn, hidden_states)
        else:
            out = self._cross_attention(attn, hidden_states, encoder_hidden_states)
        out = out.transpose(1, 2).flatten(2)
        if self.weight_out is not None:
            return linear(out, self.weight_out, self.bias_out)
        return attn.to_out[1](self._project(attn, "out", out.to(hidden_states.dtype)))

    def _project(self, attn: Attention, name: str, x: Tensor) -> Tensor:
        layer = attn.to_out[0] if name == "out" else getattr(attn, f"to_{name}")
        y = layer(x)
        for lora in self.state.loras:
            pair = lora.layers.get(self.number, {}).get(name)
            if pair is not None:
                y = y + lora.strength * F.linear(F.linear(x, pair[0]), pair[1])
        return y

    def _heads(self, attn: Attention, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, heads, S, C / heads)."""
        return x.view(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)

    def _cross_attention(self, attn: Attention, x: Tensor, context: Tensor) -> Tensor:
        if self.text_kv is None:
            self.prepare(attn, context)
        weight = self.weight_in
        q = self._heads(attn, linear(x, weight) if weight is not None else self._project(attn, "q", x))
        k, v = self.text_kv  # type: ignore[misc]
        out = attend(q, k, v, self.state.backend)
        for index, (k, v) in enumerate(self.stream_kv):
            stream = self.state.streams[index]
            if not stream.active:
                continue
            seen = attend(q, k, v, self.state.backend)
            if stream.region is None:
                out = out + seen
            else:
                out = torch.addcmul(out, seen, self.state.mask(index, stream, q.shape[2]))
        return out

    def prepare(self, attn: Attention, context: Tensor) -> None:
        """Compute the keys and values of text and identity for the whole request."""
        k, v = self._project(attn, "k", context), self._project(attn, "v", context)
        self.text_kv = (self._heads(attn, k), self._heads(attn, v))
        self.stream_kv = [self._stream(attn, stream) for stream in self.state.streams]

    def _stream(self, attn: Attention, stream: Stream) -> tuple[Tensor, Tensor]:
        """The scale of a row is a factor of all that attention adds, so it can be a factor of the values."""
        k = F.linear(stream.tokens, stream.weights.key[self.number])
        v = F.linear(stream.tokens, stream.weights.value[self.number]) * stream.scale
        return self._heads(attn, k), self._heads(attn, v)

    def _self_attention(self, attn: Attention, x: Tensor) -> Tensor:
        state = self.state
        if state.recording:
            self.recorded = x
        if state.reference_rows is not None and self.recorded is not None and not state.recording:
            return self._with_reference(attn, x, state.reference_rows, self.recorded)
        if self.weight_in is not None:
            qkv = linear(x, self.weight_in).view(x.shape[0], x.shape[1], 3, attn.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (self._heads(attn, self._project(attn, name, x)) for name in ("q", "k", "v"))
        return attend(q, k, v, state.backend)

    def _with_reference(self, attn: Attention, x: Tensor, rows: slice, recorded: Tensor) -> Tensor:
        """Self-attention in which ``rows`` also see the recorded features."""
        q = self._heads(attn, self._project(attn, "q", x))
        parts = []
        for part, reference in ((slice(0, rows.start), None), (rows, recorded)):
            if part.start == part.stop:
                continue
            own = x[part] if reference is None else torch.cat([x[part], reference], dim=1)
            k, v = self._heads(attn, self._project(attn, "k", own)), self._heads(attn, self._project(attn, "v", own))
            parts.append(attend(q[part], k, v, self.state.backend))
        return torch.cat(parts)


def region_mask(region: Tensor, length: int, aspect: float) -> Tensor:
    """A region (B or 1, 1, H, W) over a flattened sequence of ``length``, (B or 1, 1, L, 1)."""
    height = max(1, round(math.sqrt(length / aspect)))
    while length % height:
        height -= 1
    mask = F.interpolate(region.float(), (height, length // height), mode="area")
    return mask.flatten(2).unsqueeze(-1).to(region.dtype)
