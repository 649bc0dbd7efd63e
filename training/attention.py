"""Decoupled cross-attention for training: text and identity tokens meet the same queries in two separate softmaxes.

IP-Adapter (Ye et al., 2023, eq. 5): out = Attn(q, k_text, v_text) + scale * Attn(q, k_identity, v_identity).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v over [n, heads, length, d].

    On a CPU written out: the fused kernel's backward takes ten times as long on sequences this short.
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value)
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return weights.softmax(-1).to(value.dtype) @ value


class DecoupledProcessor:
    """A diffusers attention processor; ``key`` and ``value`` belong to the adapter, so that the UNet's file stays
    clean.
    """

    def __init__(self, key: nn.Linear | None = None, value: nn.Linear | None = None) -> None:
        self.key, self.value = key, value

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        identity_tokens: Tensor | None = None,
        identity_scale: float = 1.0,
    ) -> Tensor:
        """hidden_states [n, L, C], encoder_hidden_states [n, T, X], identity_tokens [n, N, X] -> [n, L, C]."""
        del attention_mask, temb
        n, length, _ = hidden_states.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(n, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = heads(attn.to_q(hidden_states))
        out = attention(query, heads(attn.to_k(context)), heads(attn.to_v(context)))
        if self.key is not None and self.value is not None and identity_tokens is not None:
            out = out + identity_scale * attention(
                query, heads(self.key(identity_tokens)), heads(self.value(identity_tokens))
            )
        return attn.to_out[0](out.transpose(1, 2).reshape(n, length, -1))


def attention_names(unet: Any) -> list[str]:
    """All attention layers in the order that numbers the keys of public files: down, up and then the middle block."""
    names = [k.removesuffix(".processor") for k in unet.attn_processors]
    rank = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}
    return sorted(names, key=lambda k: rank[k.split(".")[0]])  # sorted() is stable: the order within a block stays


class IdentityKeyValues(nn.Module):
    """One key and value projection for every cross-attention layer of a UNet, with the public files' numbering.

    They start as the text's own projections, enlarged: identity tokens come out of a LayerNorm and are several times
    shorter than our text tokens, and a signal that starts small is learned late.
    """

    def __init__(self, unet: Any, key_gain: float = 1.5, value_gain: float = 3.0) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for i, name in enumerate(attention_names(unet)):
            if name.endswith("attn1"):
                continue
            attn = unet.get_submodule(name)
            key = nn.Linear(attn.to_k.in_features, attn.to_k.out_features, bias=False)
            value = nn.Linear(attn.to_v.in_features, attn.to_v.out_features, bias=False)
            key.load_state_dict({"weight": attn.to_k.weight.detach() * key_gain})
            value.load_state_dict({"weight": attn.to_v.weight.detach() * value_gain})
            self.layers[str(i)] = nn.ModuleDict({"to_k_ip": key, "to_v_ip": value})

    def attach(self, unet: Any) -> None:
        """Install the processors."""
        processors = {}
        for i, name in enumerate(attention_names(unet)):
            if str(i) in self.layers:
                pair: Any = self.layers[str(i)]
                processors[f"{name}.processor"] = DecoupledProcessor(pair["to_k_ip"], pair["to_v_ip"])
            else:
                processors[f"{name}.processor"] = DecoupledProcessor()
        unet.set_attn_processor(processors)

    def tensors(self) -> dict[str, Tensor]:
        """State with the public key names, without prefix: ``1.to_k_ip.weight`` and so on."""
        return {k.removeprefix("layers."): v for k, v in self.state_dict().items()}


def attach_plain(unet: Any) -> None:
    """The same fast processor everywhere, without identity."""
    unet.set_attn_processor({k: DecoupledProcessor() for k in unet.attn_processors})
