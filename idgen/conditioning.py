"""What a pipeline hands to the sampler. Methods differ in nothing else.

Shapes: B images in the batch, T text tokens, N identity tokens, D cross-attention width, P pooled width, h x w latents.
Whatever is guided comes as a pair: the conditional half and the unconditional half.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from idgen.adapters.attention import LoraWeights, StreamWeights


@dataclass(eq=False)
class TextTokens:
    """Prompt embeddings. Methods that speak through the text channel (face tokens) substitute theirs here."""

    positive: Tensor
    """(B, T, D)"""
    negative: Tensor | None
    """(B, T, D), or None when guidance is off."""
    pooled: Tensor | None = None
    """(B, P), SDXL only"""
    negative_pooled: Tensor | None = None
    time_ids: Tensor | None = None
    """(B, 6): original height, width, crop top, left, target height, width in pixels (SDXL paper, section 2.2)."""


@dataclass(eq=False)
class TokenStream:
    """Identity tokens with key and value projections of their own in every cross-attention layer."""

    weights: StreamWeights
    positive: Tensor
    """(B, N, D)"""
    negative: Tensor
    """(B, N, D), what the method's projection makes of "no identity"; rarely zeros."""
    scale: Tensor
    """(B,)"""
    region: Tensor | None = None
    """(B or 1, 1, H, W) in 0..1"""
    start: float = 0.0
    end: float = 1.0


@dataclass(eq=False)
class ControlBranch:
    """A ControlNet that runs beside the UNet; its residuals are added to the UNet's skip connections."""

    model: Any
    image: Tensor
    """(B, 3, H, W) in 0..1"""
    scale: Tensor
    """(B,)"""
    positive: Tensor | None = None
    """(B, N, D) its own encoder tokens; None: the text's."""
    negative: Tensor | None = None
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False
    """Weigh the residuals from 0.1 at the outermost skip to 1 at the middle block (as the ControlNet repository)."""

    def keep(self, step: int, steps: int) -> bool:
        """Whether the branch runs at ``step`` of ``steps``: the whole step must lie inside [start, end]."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


@dataclass(eq=False)
class Start:
    """Where the loop begins: noise alone, or a noised image of which a part may be kept (inpainting)."""

    noise: Tensor
    """(B, c, h, w) unit Gaussian"""
    image: Tensor | None = None
    """(B, c, h, w) scaled VAE latents of the image to start from"""
    strength: float = 1.0
    mask: Tensor | None = None
    """(B or 1, 1, h, w), 1 where the picture may change"""


@dataclass(eq=False)
class Conditioning:
    """All that steers one run of the sampler."""

    text: TextTokens
    streams: list[TokenStream] = field(default_factory=list)
    branches: list[ControlBranch] = field(default_factory=list)
    loras: list[LoraWeights] = field(default_factory=list)
    unet: Any = None
    """A UNet to run instead of the backbone's own (methods that ship a whole fine-tuned UNet)."""
    reference: Tensor | None = None
    """(B, c, h, w) clean latents whose features the conditional half's self-attention also sees."""

    def merged(self, other: Conditioning) -> Conditioning:
        """Two methods at once: streams, branches and LoRAs of both. At most one may bring a UNet or face tokens."""
        return Conditioning(
            text=self.text,
            streams=[*self.streams, *other.streams],
            branches=[*self.branches, *other.branches],
            loras=[*self.loras, *other.loras],
            unet=self.unet if self.unet is not None else other.unet,
            reference=self.reference if self.reference is not None else other.reference,
        )
