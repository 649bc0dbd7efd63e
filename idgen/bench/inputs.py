"""Random inputs for speed measurements, the same for idgen and for what it is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from idgen.adapters.attention import StreamWeights
from idgen.adapters.projections import build_projection
from idgen.bench.models import Size, ip_adapter_state
from idgen.conditioning import Conditioning, ControlBranch, Start, TextTokens, TokenStream

CLIP_WIDTH = 64
TEXT_TOKENS = 77


@dataclass(eq=False)
class Inputs:
    """B images; k people, each with a region when there are several."""

    size: Size
    text: Tensor
    """(B, 77, D)"""
    negative: Tensor
    pooled: Tensor | None
    """(B, P), SDXL only"""
    negative_pooled: Tensor | None
    time_ids: Tensor
    """(B, 6)"""
    images: Tensor
    """(B, k, 64) image embeddings for a plain IP-Adapter"""
    tokens: Tensor
    """(B, 16, D) InstantID's projected tokens"""
    no_tokens: Tensor
    control: Tensor
    """(B, 3, H, W)"""
    noise: Tensor
    """(B, 4, h, w)"""
    regions: Tensor | None = None
    """(k, 1, H, W), the quarters of the picture"""
    scale: float = 0.8
    structure_scale: float = 0.8

    @classmethod
    def random(
        cls, size: Size, device: str = "cpu", dtype: str = "float32", batch: int = 1, people: int = 1, seed: int = 0
    ) -> Inputs:
        """Unit Gaussian everything; drawn on the CPU so that a seed means the same on every device."""
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, getattr(torch, dtype))

        side = size.pixels
        regions = None
        if people > 1:
            regions = torch.zeros(people, 1, side, side)
            for k in range(people):
                row, column = divmod(k % 4, 2)
                regions[k, 0, row * side // 2 :, column * side // 2 :][: side // 2, : side // 2] = 1
            regions = regions.to(device, getattr(torch, dtype))
        return cls(
            size,
            rand(batch, TEXT_TOKENS, size.context),
            rand(batch, TEXT_TOKENS, size.context),
            rand(batch, size.pooled) if size.pooled else None,
            rand(batch, size.pooled) if size.pooled else None,
            torch.tensor([[side, side, 0, 0, side, side]] * batch, dtype=torch.float32, device=device),
            rand(batch, people, CLIP_WIDTH),
            rand(batch, size.identity_tokens, size.context),
            rand(batch, size.identity_tokens, size.context),
            torch.rand(batch, 3, side, side, generator=generator).to(device, getattr(torch, dtype)),
            rand(batch, 4, size.latent, size.latent),
            regions,
        )

    @property
    def start(self) -> Start:
        """For :func:`idgen.sampler.sample`."""
        return Start(self.noise)

    def _text(self) -> TextTokens:
        ids = self.time_ids if self.pooled is not None else None
        return TextTokens(self.text, self.negative, self.pooled, self.negative_pooled, ids)

    def _scale(self, value: float) -> Tensor:
        return torch.full((len(self.text),), value)

    def ip_adapter(self, weights: StreamWeights) -> Conditioning:
        """As the pipeline ``ip-adapter`` builds it: one stream a person."""
        state = ip_adapter_state(weights, self.size, clip=CLIP_WIDTH)["image_proj"]
        project = build_projection(state, "the bench").to(self.text.device, self.text.dtype)
        streams = []
        with torch.no_grad():
            for k in range(self.images.shape[1]):
                person, nobody = project(self.images[:, k]), project(self.images[:, k] * 0)
                region = None if self.regions is None else self.regions[k : k + 1]
                streams.append(TokenStream(weights, person, nobody, self._scale(self.scale), region))
        return Conditioning(self._text(), streams)

    def instantid(self, weights: StreamWeights, controlnet: object) -> Conditioning:
        """As the pipeline ``instantid`` builds it."""
        stream = TokenStream(weights, self.tokens, self.no_tokens, self._scale(self.scale))
        scale = self._scale(self.structure_scale)
        branch = ControlBranch(controlnet, self.control, scale, self.tokens, self.no_tokens)
        return Conditioning(self._text(), [stream], [branch])
