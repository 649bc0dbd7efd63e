"""From a face embedding to identity tokens: the FaceID projector, and its pre-training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .backbone import CONTEXT
from .loop import Loop

TOKENS = 6
"""Identity tokens per face."""
EMBEDDING = 512


class FaceIdProjector(nn.Module):
    """IP-Adapter FaceID's ``image_proj``: Linear, GELU, Linear, LayerNorm (keys proj.0, proj.2, norm).

    Takes embeddings normalised to length 1 [n, 512], gives tokens [n, TOKENS, width]. Unconditional: zeros in.
    """

    def __init__(self, width: int = CONTEXT, tokens: int = TOKENS) -> None:
        super().__init__()
        self.tokens, self.width = tokens, width
        first, last = nn.Linear(EMBEDDING, EMBEDDING), nn.Linear(EMBEDDING, tokens * width)
        self.proj = nn.Sequential(first, nn.GELU(), last)
        self.norm = nn.LayerNorm(width)
        # Entries of a unit vector are about .04: without larger weights the first layer would see next to nothing.
        nn.init.normal_(first.weight, std=1.0)
        nn.init.zeros_(first.bias)
        nn.init.normal_(last.weight, std=0.05)
        nn.init.normal_(last.bias, std=0.05)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.norm(self.proj(embeddings).view(len(embeddings), self.tokens, self.width))


def pretrain(
    projector: FaceIdProjector,
    embeddings: Tensor,
    goals: Tensor,
    root: Path,
    minutes: float,
    *,
    device: str = "cpu",
    held_out: tuple[Tensor, Tensor] | None = None,
    batch: int = 128,
) -> None:
    """Teach the tokens to give the identity parameters away by a linear reading.

    ``embeddings`` [n, 512] unit, ``goals`` [n, K]; ``held_out`` the same of other people, for the log.
    """
    torch.manual_seed(31)
    read = nn.Linear(projector.tokens * projector.width, goals.shape[1]).to(device)
    projector.to(device).train()
    centre, spread = goals.mean(0).to(device), goals.std(0).clamp(min=0.05).to(device)

    def error(e: Tensor, y: Tensor) -> Tensor:
        return (read(projector(e.to(device)).flatten(1)) - (y.to(device) - centre) / spread).pow(2).mean()

    def look() -> dict[str, float]:
        return {"held_out": float(error(*held_out))} if held_out else {}

    loop = Loop(
        "projector",
        root,
        {"projector": projector, "read": read},
        minutes,
        rate=1e-3,
        weight_decay=0.05,
        muon=False,
        decay=0.8,
        averaging=0.99,
        on_save=look,
        save_every=60,
    )
    while loop.going:
        rows = torch.randint(0, len(embeddings), (batch,))
        e = embeddings[rows].float()
        e = nn.functional.normalize(e + 0.012 * torch.randn_like(e), dim=1)
        loop.update(error(e, goals[rows]), batch)
    loop.finish()
