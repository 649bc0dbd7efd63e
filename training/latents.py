"""The generator's training set: latents, embeddings, face masks and labels of the rendered people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from .autoencoder import encode
from .data import PER_PERSON, read_shard, shards
from .heads import ATTRIBUTES, identity_parameters


def make(
    data: Path,
    out: Path,
    vae: AutoencoderTiny,
    recogniser: nn.Module,
    *,
    device: str = "cpu",
    part: int = 0,
    parts: int = 1,
) -> None:
    """Encode every shard below ``data`` that ``out`` lacks; several processes can share the work."""
    from .facedata import jitter_keypoints
    from .recogniser import embed

    out.mkdir(parents=True, exist_ok=True)
    paths = [p for split in ("validation", "train") for p in shards(data, split)][part::parts]
    for path in tqdm([p for p in paths if not (out / p.name).exists()], desc="encoding", unit="shard", mininterval=30):
        shard = read_shard(path)
        torch.manual_seed(int.from_bytes(path.stem.encode()[-6:], "big"))
        points = jitter_keypoints(shard.keypoints)  # as a detector would find them
        with torch.no_grad():
            found = embed(recogniser, shard.images, points)
        tensors = {
            "latents": encode(vae, shard.images, device), "embeddings": found.cpu().half(), "masks": shard.masks,
            "people": shard.people, "keypoints": shard.keypoints,
            "attributes": torch.stack([shard.attributes[k] for k in ATTRIBUTES], 1).to(torch.uint8),
        }  # fmt: skip
        temporary = out / (path.stem + ".part")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        temporary.replace(out / path.name)


@dataclass
class Batch:
    """What one optimiser step sees; see :meth:`LatentSet.batch`."""

    rows: Tensor
    latents: Tensor
    weights: Tensor
    references: Tensor
    labels: dict[str, Tensor]


class LatentSet:
    """All latents of a split in memory.

    ``latents`` float16 [n, 8, 16, 16]; ``embeddings`` raw float16 [n, 512]; ``masks`` uint8 [n, 1, 16, 16];
    ``keypoints`` [n, 5, 2]; ``labels`` name -> [n]; ``centres`` unit mean embedding of every person's photos [n / 8,
    512]; ``parameters`` [n / 8, K]. Render i shows person i // 8.
    """

    def __init__(self, folder: Path, split: str, limit: int | None = None) -> None:
        paths = sorted(folder.glob(f"{split}-*.safetensors"))[:limit]
        if not paths:
            raise FileNotFoundError(f"no {split} latents in {folder}: run `python -m idgen.training latents` first")
        parts = [load_file(p) for p in paths]
        whole = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        self.latents, self.embeddings, self.masks = whole["latents"], whole["embeddings"], whole["masks"]
        self.keypoints, self.people = whole["keypoints"], whole["people"]
        self.labels = {k: whole["attributes"][:, i].long() for i, k in enumerate(ATTRIBUTES)}
        self.parameters = identity_parameters(self.people)
        n = len(self.latents)
        self.person = torch.arange(n) // PER_PERSON
        self.photo = self.labels["style"] == 0
        unit = F.normalize(self.embeddings.float(), dim=1) * self.photo[:, None]
        self.centres = F.normalize(unit.view(-1, PER_PERSON, unit.shape[1]).sum(1), dim=1)

    def __len__(self) -> int:
        return len(self.latents)

    def reference_rows(self, rows: Tensor) -> Tensor:
        """For every row a random photo of the same person."""
        chance = torch.rand(len(rows), PER_PERSON) * self.photo.view(-1, PER_PERSON)[self.person[rows]]
        # The first render of each person is a photo, so there always is one.
        return self.person[rows] * PER_PERSON + chance.argmax(1)

    def references(self, rows: Tensor, mean_share: float = 0.3, raw: bool = False) -> Tensor:
        """Reference embeddings [k, 512]: of another photo of the same person, or for a share of rows the person's mean.

        Normalised, or with ``raw`` as the recogniser gives them (then never the mean).
        """
        other = self.embeddings[self.reference_rows(rows)].float()
        if raw:
            return other
        use_mean = torch.rand(len(rows), 1) < mean_share
        return torch.where(use_mean, self.centres[self.person[rows]], F.normalize(other, dim=1))

    def batch(self, n: int, device: torch.device | str, face_weight: float, styled: float = 1.0) -> Batch:
        """A random batch. ``weights`` [n, 1, 16, 16] have mean 1 and are larger on the face; ``styled``: the share of
        drawn styles to keep."""
        rows = torch.randint(0, len(self), (n,))
        if styled < 1:
            photo = rows - rows % PER_PERSON
            rows = torch.where(self.photo[rows] | (torch.rand(n) < styled), rows, photo)
        weight = 1 + face_weight * self.masks[rows].float() / 255
        weight = weight / weight.mean((1, 2, 3), keepdim=True)
        latents = self.latents[rows].to(device).float()
        labels = {k: v[rows] for k, v in self.labels.items()}
        return Batch(rows, latents, weight.to(device), self.references(rows).to(device), labels)
