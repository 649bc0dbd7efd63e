"""What the generator's predictions look like to networks that see faces: decoded, aligned, recognised, read.

The latent reader (:mod:`.latent_reader`) is quick and coarse. This teacher decodes a few predictions of every batch,
cuts the face out where the rendered one has its keypoints, and asks the conditioning recogniser for the person and the
expression reader for the expression, as identity losses do that decode (PuLID, arXiv:2404.16022, section 3.3). The
recogniser that scores portraits and the reader that judges prompts take no part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor, nn

from .expression import ExpressionReader
from .facedata import align, jitter_keypoints
from .latents import LatentSet

EARLIEST, LATEST = 50, 600
"""Training times that are taught: before, nothing is left to learn; after, the decoded prediction shows no face."""
SHARE = 0.25
"""Of the batch, at most: decoding costs as much as the UNet."""


@dataclass
class FaceTeacher:
    """Frozen networks, all on one device."""

    vae: AutoencoderTiny
    recogniser: nn.Module
    expression: ExpressionReader

    def __call__(
        self, clean: Tensor, a: Tensor, t: Tensor, rows: Tensor, said: Tensor, nobody: Tensor, data: LatentSet
    ) -> tuple[Tensor, float]:
        """How far the faces of predicted clean latents [n, 8, 16, 16] are from the right person and expression.

        a: sqrt(alpha) [n, 1, 1, 1], the weight of a row; t: times [n]; rows: of ``data``; said: 1 where the caption
        says the expression [n]; nobody: where no identity was given [n]. Returns the loss (a sum over the taught rows
        divided by n) and the mean cosine to the person.
        """
        device = clean.device
        fit = ((t >= EARLIEST) & (t < LATEST)).nonzero().flatten()
        chosen = fit[torch.randperm(len(fit), device=device)][: max(1, round(SHARE * len(t)))]
        if not len(chosen):
            return clean.sum() * 0, 0.0
        mine = rows[chosen.cpu()]
        with torch.autocast(device.type, torch.bfloat16):
            pictures = self.vae.decode(clean[chosen].contiguous(memory_format=torch.channels_last)).sample
        # Cut out in float32: positions in bfloat16 would be whole pixels.
        crops = align((pictures.float() + 1) * 127.5, jitter_keypoints(data.keypoints[mine].float()).to(device))
        crops = crops.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            unit = F.normalize(self.recogniser(crops).float(), dim=1)
            scores = self.expression(crops)
        weight = a.flatten()[chosen]
        own = (unit * data.centres[data.person[mine]].to(device)).sum(1)
        # Drawings have no colours and other lines: the embedding of a photo is not what they should give.
        known = weight * (~nobody[chosen]) * data.photo[mine].to(device)
        wrong = F.cross_entropy(scores, data.labels["expression"][mine].to(device), reduction="none")
        loss = ((1 - own) * known + 0.5 * wrong * weight * said.to(device)[chosen]).sum() / len(t)
        return loss, float((own.detach() * known).sum() / known.sum().clamp(min=1e-3))
