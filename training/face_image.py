"""FaceID-PlusV2's second eye: a tiny CLIP vision encoder and the perceiver that refines the identity tokens with it.

No diffusion is needed to train them. The projector is frozen; the refinement learns what the tokens of one photo lack
of the tokens of the person's mean embedding, so that the same key and value projections serve FaceID and PlusV2 files.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from idgen.adapters.image_encoder import MEAN, STD
from idgen.adapters.projections import HEAD_WIDTH, Perceiver

from .backbone import CONTEXT, load_as_float
from .data import RenderSet
from .facedata import align, jitter_keypoints
from .heads import PARAMETERS
from .latents import LatentSet
from .loop import Loop
from .projector import FaceIdProjector

IMAGE = 224
WIDTH = 128


def build_image_encoder() -> CLIPVisionModelWithProjection:
    """A vision transformer over 64 patches of 28 pixels, three layers."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=IMAGE,
            patch_size=28,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=64,
            hidden_act="gelu",
        )
    )


def save_image_encoder(model: CLIPVisionModelWithProjection, folder: Path) -> None:
    """Write the encoder (fp16) and the standard CLIP preprocessing."""
    model.half().save_pretrained(folder)
    load_as_float(folder)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE},
        "do_center_crop": True,
        "crop_size": {"height": IMAGE, "width": IMAGE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_convert_rgb": True,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))


class FaceImage(nn.Module):
    """Aligned crops and FaceID tokens -> a correction of the tokens (``structure_scale`` 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = build_image_encoder()
        self.perceiver = Perceiver(WIDTH, CONTEXT, CONTEXT // HEAD_WIDTH, 2, 4 * CONTEXT, CONTEXT)
        nn.init.zeros_(self.perceiver.norm_out.weight)
        self.read = nn.Linear(WIDTH, len(PARAMETERS))

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [n, 3, 224, 224] (CLIP's normalisation), tokens [n, N, C] -> correction [n, N, C], parameters [n,
        K].
        """
        patches = self.encoder(pixels, output_hidden_states=True).hidden_states[-2]
        return self.perceiver(patches, tokens), self.read(patches.mean(1))


def clip_input(images: Tensor, keypoints: Tensor) -> Tensor:
    """Renders [n, 3, H, W] (0..255) to aligned, normalised crops [n, 3, 224, 224]."""
    crops = align(images, keypoints, IMAGE) / 2 + 0.5
    mean, std = (torch.tensor(v, device=crops.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (crops - mean) / std


def train(
    data: LatentSet,
    renders: RenderSet,
    held_out: LatentSet,
    held_out_renders: RenderSet,
    projector: FaceIdProjector,
    root: Path,
    minutes: float,
    *,
    device: str = "cpu",
    batch: int = 32,
    rate: float = 2e-3,
    name: str = "face_image",
) -> FaceImage:
    """Train encoder and perceiver on the photos among ``renders`` (the first people of ``data``)."""
    torch.manual_seed(61)
    model = FaceImage().to(device)
    projector = projector.to(device).eval().requires_grad_(False)
    photos = data.photo[: len(renders)].nonzero().flatten()

    def losses(source: LatentSet, pictures: RenderSet, rows: Tensor) -> tuple[Tensor, Tensor]:
        nobody = torch.rand(len(rows)) < 0.08
        keep = (~nobody).float().to(device)
        points = jitter_keypoints(pictures.keypoints[rows]).to(device)
        pixels = clip_input(pictures.images[rows].to(device), points) * keep.view(-1, 1, 1, 1)
        person = source.person[rows]
        e = F.normalize(source.embeddings[rows].float(), dim=1).to(device) * keep[:, None]
        goal = projector(source.centres[person].to(device) * keep[:, None])
        tokens = projector(e)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            correction, parameters = model(pixels, tokens)
        miss = (tokens + correction.float() - goal).pow(2).mean()
        known = ((parameters.float() - source.parameters[person].to(device)).pow(2).mean(1) * keep).mean()
        return miss + 0.3 * known, miss / (tokens - goal).pow(2).mean()

    def look() -> dict[str, float]:
        state = torch.get_rng_state()
        torch.manual_seed(1)
        rows = held_out.photo[: len(held_out_renders)].nonzero().flatten()[:256]
        share = float(losses(held_out, held_out_renders, rows)[1])
        torch.set_rng_state(state)
        return {"left_of_gap": share}  # 1: no better than the projector alone

    loop = Loop(
        name, root, {"model": model}, minutes, rate=rate, decay=0.7, averaging=0.995, on_save=look, save_every=60
    )
    while loop.going:
        loss, share = losses(data, renders, photos[torch.randint(0, len(photos), (batch,))])
        loop.update(loss, batch, left=float(share.detach()))
    loop.finish()
    return model.eval()
