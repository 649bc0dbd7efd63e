"""The picture autoencoder: diffusers' AutoencoderTiny, 128 px to 16 x 16 latents of 8 channels, trained from nothing.

AutoencoderKL of like size ran 20 to 40 times slower on a CPU. The latents are normalised to zero mean and unit variance
while training and the normalisation is folded into the encoder's last layer, so that scaling_factor is 1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor, nn

from .data import RenderSet
from .loop import Loop
from .sheets import save_sheet
from .workers import Workers

LATENT_CHANNELS = 8
FACTOR = 8


@dataclass(frozen=True)
class AutoencoderSize:
    """Width and blocks per resolution (encoder from fine to coarse, decoder from coarse to fine)."""

    encoder_width: int = 32
    decoder_width: int = 48
    encoder_blocks: tuple[int, ...] = (0, 1, 2, 3)
    decoder_blocks: tuple[int, ...] = (4, 3, 2, 0)


CPU_SIZE = AutoencoderSize()
CUDA_SIZE = AutoencoderSize(40, 48, (1, 1, 2, 3), (4, 3, 2, 1))
"""Two blocks more at full resolution; larger, and the set would not fit into 60 MB: both backbones hold a copy."""


def build(size: AutoencoderSize) -> AutoencoderTiny:
    """An untrained autoencoder. It has no norms, so the initialisation has to keep the variance (He, small
    residuals).
    """
    model = AutoencoderTiny(
        encoder_block_out_channels=(size.encoder_width,) * 4,
        decoder_block_out_channels=(size.decoder_width,) * 4,
        num_encoder_blocks=size.encoder_blocks,
        num_decoder_blocks=size.decoder_blocks,
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if type(module).__name__ == "AutoencoderTinyBlock":
            module.conv[4].weight.data.mul_(0.1)
    model.decoder.layers[-1].weight.data.mul_(0.2)
    nn.init.constant_(model.decoder.layers[-1].bias, 0.5)
    nn.init.kaiming_normal_(model.encoder.layers[-1].weight, nonlinearity="linear")
    return model


class LatentNorm(nn.Module):
    """Batch norm without parameters over latents [n, C, h, w]; its running moments are folded into the encoder
    later.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int = LATENT_CHANNELS) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.workers = Workers()

    def forward(self, z: Tensor) -> Tensor:
        if not self.training:
            return (z - self.mean[:, None, None]) * (self.var[:, None, None] + 1e-5).rsqrt()
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3))
        both = self.workers.mean_(torch.cat([mean.detach(), var.detach()]))
        self.mean.lerp_(both[: len(mean)], 0.02)
        self.var.lerp_(both[len(mean) :], 0.02)
        return (z - mean[:, None, None]) * (var[:, None, None] + 1e-5).rsqrt()


@torch.no_grad()
def fold(model: AutoencoderTiny, norm: LatentNorm) -> None:
    """Multiply the latent normalisation into the encoder's last convolution and reset it."""
    last = model.encoder.layers[-1]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    scale = (norm.var + 1e-5).rsqrt()
    last.weight.mul_(scale.view(-1, 1, 1, 1))
    last.bias.copy_((last.bias - norm.mean) * scale)
    norm.mean.zero_()
    norm.var.fill_(1 - 1e-5)


def to_range(images: Tensor) -> Tensor:
    """uint8 images to -1..1, channels last."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def crops(data: RenderSet, batch: int, size: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Random crops [batch, 3, size, size] (uint8, each at a place of its own, on the latent grid), rows and offsets.

    One place for a whole batch, together with batch norm, held the quality at 23 dB.
    """
    rows = torch.randint(0, len(data), (batch,))
    if size == data.images.shape[-1]:
        return data.images[rows].to(device), rows, torch.zeros(batch, 2, dtype=torch.long)
    steps = (data.images.shape[-1] - size) // FACTOR + 1
    offsets = torch.randint(0, steps, (batch, 2))
    cut = [
        data.images[i, :, FACTOR * y : FACTOR * y + size, FACTOR * x : FACTOR * x + size]
        for i, (y, x) in zip(rows.tolist(), offsets.tolist())
    ]
    return torch.stack(cut).to(device), rows, offsets


def reconstruction_loss(out: Tensor, target: Tensor) -> Tensor:
    """L1 + 3 MSE + .3 L1 of the image gradients, over images in -1..1."""
    d = out - target
    gradient = (d[:, :, 1:] - d[:, :, :-1]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()
    return d.abs().mean() + 3 * d.pow(2).mean() + 0.3 * gradient


def psnr(out: Tensor, target: Tensor) -> float:
    """Mean peak signal-to-noise ratio (dB) over images in -1..1."""
    return float(-10 * ((out.clamp(-1, 1) - target) / 2).pow(2).mean((1, 2, 3)).log10().mean())


def train(
    data: RenderSet,
    validation: RenderSet,
    root: Path,
    minutes: float,
    *,
    size: AutoencoderSize = CPU_SIZE,
    device: str = "cpu",
    workers: Workers | None = None,
    batch: int = 24,
    crop: int = 64,
    rate: float = 3e-3,
    likeness: Any = None,
    decoder_only: bool = False,
    start: Path | None = None,
    name: str = "autoencoder",
    muon: bool = True,
    save_every: float = 90.0,
) -> AutoencoderTiny:
    """Train the autoencoder, or with ``decoder_only`` go on with the decoder while the encoder stays what it is.

    ``likeness``: optional function (images in -1..1 [n, 3, 128, 128], keypoints [n, 5, 2]) -> unit embeddings, whose
    cosine distance joins the loss on every fifth step. Writes a diffusers folder ``root / name``. Deterministic only up
    to the number of workers. Returns the averaged model, encoder normalisation folded in.
    """
    workers = workers or Workers()
    torch.manual_seed(11)
    model = AutoencoderTiny.from_pretrained(start) if start else build(size)
    model.to(device)  # type: ignore[arg-type]  # diffusers' wrapper hides that this is a method
    norm = LatentNorm().to(device)
    norm.workers = workers
    if decoder_only:
        model.encoder.requires_grad_(False)
        norm.eval()
        norm.var.fill_(1 - 1e-5)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # as above
    shown = to_range(validation.images[:64]).to(device)

    def look() -> dict[str, float]:
        norm.eval()
        out = torch.cat([model.decode(norm(model.encode(x).latents)).sample for x in shown.split(16)])
        norm.train(not decoder_only)
        save_sheet(torch.cat([shown[:10], out[:10]]) / 2 + 0.5, 10, root / f"{name}.sheet.png")
        return {"psnr": psnr(out, shown)}

    loop = Loop(
        name,
        root,
        {"model": model, "norm": norm},
        minutes,
        rate=rate,
        workers=workers,
        muon=muon,
        decay=0.6,
        averaging=0.995,
        weight_decay=1e-4,
        on_save=look,
        save_every=save_every,
    )
    torch.manual_seed(1000 * (loop.steps + 1) + workers.rank)
    kind = torch.device(device).type
    while loop.going:
        whole = likeness is not None and loop.steps % 5 == 4
        images, rows, _ = crops(data, max(4, batch // 4) if whole else batch, 128 if whole else crop, device)
        x = to_range(images)
        with torch.autocast(kind, torch.bfloat16):
            if decoder_only:
                with torch.no_grad():
                    z = norm(model.encode(x).latents.float())
            else:
                z = norm(model.encode(x).latents.float())
            # Noise makes neighbouring latents decode alike: what a generator leaves behind is never exact.
            out = model.decode(z + 0.07 * torch.randn_like(z)).sample.float()
        loss = reconstruction_loss(out, x)
        if whole:
            points = data.keypoints[rows].to(device)
            with torch.no_grad():
                wanted = likeness(x, points)
            loss = loss + 0.1 * (1 - (likeness(out.clamp(-1.1, 1.1), points) * wanted).sum(1)).mean()
        loop.update(loss, len(x))
    loop.finish()
    if not decoder_only:
        fold(model, norm)
    model.eval()
    if workers.first:
        model.save_pretrained(root / name)
        (root / f"{name}.done.json").write_text(json.dumps({"samples": loop.samples}))
    return model


@torch.no_grad()
def encode(model: AutoencoderTiny, images: Tensor, device: str = "cpu", batch: int = 64) -> Tensor:
    """uint8 images [n, 3, 128, 128] to float16 latents [n, 8, 16, 16], on the CPU."""
    out = []
    for part in images.split(batch):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            out.append(model.encode(to_range(part).to(device)).latents.to("cpu", torch.float16))
    return torch.cat(out)


def reader(recogniser: nn.Module) -> Any:
    """The ``likeness`` argument of :func:`train` from a frozen recogniser over aligned crops."""
    from .facedata import align

    recogniser.eval().requires_grad_(False)

    def embed(images: Tensor, keypoints: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            found = recogniser(align((images + 1) * 127.5, keypoints))
        return F.normalize(found.float(), dim=1)

    return embed
