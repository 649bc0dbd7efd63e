"""Projections from an identity (or image) feature to identity tokens. All sizes are read from the checkpoint.

Module names equal the key names of the public files, so that a state dict loads strictly. Only the head width of 64 in
the resampler is fixed; it is not visible in the shapes (IP-Adapter repository, ``resampler.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idgen.errors import BadWeights

HEAD_WIDTH = 64


class ImageProjection(nn.Module):
    """One linear layer from a CLIP image embedding to N tokens, then LayerNorm (plain IP-Adapter).

    (B, D) -> (B, N, C)
    """

    def __init__(self, width_in: int, tokens: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width_in, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).unflatten(-1, (-1, self.norm.normalized_shape[0])))


class MLPProjection(nn.Module):
    """Two linear layers with exact GELU from an embedding to N tokens, then LayerNorm (FaceID).

    (B, 512) -> (B, N, C); several embeddings of one person, (B, k, 512) -> (B, k N, C) (the portrait variant).
    """

    def __init__(self, width_in: int, hidden: int, tokens: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, tokens * width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.proj(x).unflatten(-1, (-1, self.norm.normalized_shape[0])))
        return y if y.ndim == 3 else y.flatten(1, 2)


class PatchProjection(nn.Module):
    """Two linear layers applied to every image token, then LayerNorm ("full face" IP-Adapter).

    (B, S, D) -> (B, S, C)
    """

    def __init__(self, width_in: int, hidden: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PerceiverAttention(nn.Module):
    """Latent queries attend to features and to themselves (Flamingo, arXiv:2204.14198, section 3.1)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(heads * HEAD_WIDTH, width, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """features (B, S, W), latents (B, Q, W) -> (B, Q, W)."""
        a, z = self.norm1(features), self.norm2(latents)
        q = self.to_q(z)
        k, v = self.to_kv(torch.cat([a, z], dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, HEAD_WIDTH)).transpose(1, 2) for t in (q, k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _feed_forward(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
    )


class Perceiver(nn.Module):
    """A stack of perceiver blocks between an input and an output projection; the features stay the same throughout."""

    def __init__(self, width_in: int, width: int, heads: int, depth: int, hidden: int, width_out: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width_in, width)
        self.proj_out = nn.Linear(width, width_out)
        self.norm_out = nn.LayerNorm(width_out)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, heads), _feed_forward(width, hidden)]) for _ in range(depth)
        )

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """features (B, S, width_in), latents (B, Q, width) -> (B, Q, width_out)."""
        x = self.proj_in(features)
        for block in self.layers:
            attention, feed_forward = block.children()
            latents = latents + attention(x, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


class Resampler(Perceiver):
    """A perceiver with learned latents (IP-Adapter Plus on image patches, InstantID on the face embedding).

    (B, S, width_in) -> (B, Q, width_out)
    """

    def __init__(self, queries: int, width_in: int, width: int, heads: int, depth: int, hidden: int, out: int) -> None:
        super().__init__(width_in, width, heads, depth, hidden, out)
        self.latents = nn.Parameter(torch.empty(1, queries, width))

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(features, self.latents.expand(len(features), -1, -1))


class FacePlusProjection(MLPProjection):
    """FaceID tokens refined by the image features of the face (FaceID-Plus and PlusV2).

    embedding (B, 512), patches (B, S, D) -> (B, N, C). With ``shortcut`` (V2) the refinement is added to the FaceID
    tokens with weight ``face_structure``; without it (Plus) it replaces them.
    """

    def __init__(self, width_in: int, hidden: int, tokens: int, perceiver: Perceiver) -> None:
        super().__init__(width_in, hidden, tokens, perceiver.norm_out.normalized_shape[0])
        self.perceiver_resampler = perceiver

    def forward(  # type: ignore[override]
        self, embedding: Tensor, patches: Tensor, shortcut: bool, face_structure: Tensor | float
    ) -> Tensor:
        tokens = super().forward(embedding)
        refined = self.perceiver_resampler(patches, tokens)
        return tokens + face_structure * refined if shortcut else refined


def build_projection(state: Mapping[str, Tensor], source: str = "the adapter") -> nn.Module:
    """Make the projection that a state dict describes and load it strictly.

    Args:
        state: the ``image_proj`` part of an adapter file.
        source: named in the error.
    Raises:
        BadWeights: the keys fit no known projection; the first missing, unexpected or misshapen key is named.
    """
    try:
        module = _skeleton(state)
    except KeyError as error:
        raise BadWeights(f"{source}: 'image_proj' lacks the key {error.args[0]!r}.") from None
    except (IndexError, ValueError, TypeError) as error:
        raise BadWeights(f"{source}: 'image_proj' has tensors of unusable shapes ({error}).") from None
    wanted = module.state_dict()
    for key, tensor in wanted.items():
        if key not in state:
            raise BadWeights(f"{source}: 'image_proj' lacks the key {key!r}.")
        if state[key].shape != tensor.shape:
            raise BadWeights(
                f"{source}: 'image_proj.{key}' has shape {tuple(state[key].shape)}, expected {tuple(tensor.shape)}."
            )
    for key in state:
        if key not in wanted:
            raise BadWeights(f"{source}: 'image_proj' has the unexpected key {key!r}.")
    module.to_empty(device="cpu")
    dtype = next(iter(state.values())).dtype
    module.to(dtype).load_state_dict(dict(state))
    return module.eval().requires_grad_(False)


def _skeleton(state: Mapping[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        if "latents" in state:
            sizes = _perceiver_sizes(state, "")
            return Resampler(state["latents"].shape[1], *sizes)
        if any(key.startswith("perceiver_resampler.") for key in state):
            prefix = "perceiver_resampler."
            sizes = _perceiver_sizes(state, prefix)
            middle, width_in = state["proj.0.weight"].shape
            tokens = state["proj.2.weight"].shape[0] // sizes[-1]
            return FacePlusProjection(width_in, middle, tokens, Perceiver(*sizes))
        if "proj.3.weight" in state:
            middle, width_in = state["proj.0.weight"].shape
            return PatchProjection(width_in, middle, state["proj.2.weight"].shape[0])
        width = state["norm.weight"].shape[0]
        if "proj.0.weight" in state:
            middle, width_in = state["proj.0.weight"].shape
            return MLPProjection(width_in, middle, state["proj.2.weight"].shape[0] // width, width)
        rows, width_in = state["proj.weight"].shape
        return ImageProjection(width_in, rows // width, width)


def _perceiver_sizes(state: Mapping[str, Tensor], prefix: str) -> tuple[int, int, int, int, int, int]:
    """(width_in, width, heads, depth, hidden, width_out)"""
    width, width_in = state[prefix + "proj_in.weight"].shape
    heads = state[prefix + "layers.0.0.to_q.weight"].shape[0] // HEAD_WIDTH
    hidden = state[prefix + "layers.0.1.1.weight"].shape[0]
    start = len(prefix + "layers.")
    numbers = {key[start:].split(".", 1)[0] for key in state if key.startswith(prefix + "layers.")}
    return width_in, width, heads, len(numbers), hidden, state[prefix + "proj_out.weight"].shape[0]
