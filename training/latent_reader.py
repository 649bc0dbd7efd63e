"""A small network that reads identity and attributes off latents: the generator's teacher for what a picture shows.

It is trained on the training people only and is neither of the two recognisers, so that scores stay independent of it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder import LATENT_CHANNELS
from .heads import ATTRIBUTES, PARAMETERS
from .latents import LatentSet
from .loop import Loop

IMPORTANCE = {"expression": 3.0}
"""Weight of an attribute's cross entropy where it is not 1: expressions are the hardest to read and to draw."""

READ = ("expression", "pose", "light", "background", "shirt", "glasses", "hat", "hat_colour", "style")


class Residual(nn.Module):
    """Two 3x3 convolutions beside the identity, at one resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def half() -> list[nn.Module]:
            return [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1, bias=False)]

        self.body = nn.Sequential(*half(), *half())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class LatentReader(nn.Module):
    """Latents [n, 8, 16, 16] -> unit embedding [n, 512], identity parameters [n, K], attribute scores.

    Most of its depth works at full resolution: brows and the corners of a mouth are one or two latent pixels, and a
    reader that halves the resolution first confuses sad, angry and neutral faces.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()

        def down(i: int, o: int) -> list[nn.Module]:
            return [nn.GroupNorm(8, i), nn.SiLU(), nn.Conv2d(i, o, 3, 2, 1, bias=False)]

        self.body = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, width, 3, 1, 1), Residual(width), Residual(width),
            *down(width, 2 * width), Residual(2 * width), *down(2 * width, 3 * width), Residual(3 * width),
            nn.GroupNorm(8, 3 * width), nn.SiLU(),
        )  # fmt: skip
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(3 * width * 16, 512), nn.SiLU())
        self.embedding = nn.Linear(512, 512)
        self.parameters_ = nn.Linear(512, len(PARAMETERS))
        self.attributes = nn.ModuleDict({k: nn.Linear(512, len(ATTRIBUTES[k])) for k in READ})

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        h = self.out(self.body(latents)).float()
        scores = {k: layer(h) for k, layer in self.attributes.items()}
        scores = {k: v.float() for k, v in scores.items()}
        return F.normalize(self.embedding(h).float(), dim=1), self.parameters_(h).float(), scores


def attribute_loss(
    scores: dict[str, Tensor], labels: dict[str, Tensor], said: dict[str, Tensor] | None = None
) -> Tensor:
    """Mean cross entropy over attributes that show; ``said``: which rows count, per attribute."""
    device = next(iter(scores.values())).device
    style = labels["style"].to(device)
    shows = {
        "shirt": (style != 1) & (style != 2), "background": style != 1, "light": style == 0,
        "hat_colour": (style != 1) & (style != 2) & (labels["hat"].to(device) == 1),
    }  # fmt: skip
    total = torch.zeros((), device=device)
    for name, score in scores.items():
        weight = torch.ones(len(style), device=device)
        if name in shows:
            weight = weight * shows[name]
        if said is not None:
            weight = weight * said[name].to(device)
        each = F.cross_entropy(score, labels[name].to(device), reduction="none")
        total = total + IMPORTANCE.get(name, 1.0) * (each * weight).sum() / len(style)
    return total / len(scores)


def train(
    data: LatentSet, held_out: LatentSet, root: Path, minutes: float, *, device: str = "cpu", batch: int = 96
) -> LatentReader:
    """Train on noised latents: what a generator predicts is never clean."""
    torch.manual_seed(41)
    reader = LatentReader().to(device)
    reader.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    # A margin between people (CosFace) is what makes the embedding's cosine worth raising; regression alone is lax.
    def losses(source: LatentSet, n: int) -> tuple[Tensor, Tensor, Tensor]:
        b = source.batch(n, device, 0)
        level = torch.rand(n, 1, 1, 1, device=device) ** 2 * 0.7
        x = b.latents + level * torch.randn_like(b.latents)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            unit, parameters, scores = reader(x)
        centre = source.centres.to(device)
        who = source.person[b.rows].to(device)
        own = (unit * centre[who]).sum(1)
        # Against the other people of the batch.
        contrast = F.cross_entropy(16 * unit @ centre[who].T, torch.arange(n, device=device))
        known = (parameters - source.parameters.to(device)[who]).pow(2).mean()
        return 2 * (1 - own).mean() + 0.5 * contrast + known + attribute_loss(scores, b.labels), own.mean(), contrast

    def look() -> dict[str, float]:
        state = torch.get_rng_state()
        torch.manual_seed(1)
        loss, own, contrast = losses(held_out, 256)
        torch.set_rng_state(state)
        return {"held_out": float(loss), "held_out_own": float(own), "held_out_contrast": float(contrast)}

    loop = Loop(
        "reader", root, {"reader": reader}, minutes, rate=2e-3, decay=0.7, averaging=0.99, on_save=look, save_every=45
    )
    while loop.going:
        loss, own, _ = losses(data, batch)
        loop.update(loss, batch, own=float(own.detach()))
    loop.finish()
    return reader.eval().requires_grad_(False)
