"""Rendered training data: shards of people, with seeds that keep training, validation and test people apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .heads import ATTRIBUTES, Renders, render, sample_nuisances, sample_people

PER_PERSON = 8
"""Renders of each person; the first is a frontal photo without hat and glasses."""
SHARD_PEOPLE = 100
SPLIT_SEEDS: dict[str, int] = {"train": 1_000_000, "validation": 2_000_000, "test": 3_000_000}
"""Shard k of a split is drawn with seed SPLIT_SEEDS[split] + k. Test people are for benchmarks and examples only."""
SIZE = 128


@dataclass
class RenderSet:
    """Renders in memory.

    ``images`` uint8 [n, 3, 128, 128]; ``keypoints`` [n, 5, 2] and ``boxes`` [n, 4] in pixels; ``masks`` uint8
    [n, 1, 16, 16], the share of visible face in every latent cell; ``people`` [n / 8, D]; ``attributes`` name -> [n].
    Render i shows person i // 8.
    """

    images: Tensor
    keypoints: Tensor
    boxes: Tensor
    masks: Tensor
    people: Tensor
    attributes: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.images)


def render_shard(split: str, index: int, *, device: str = "cpu", compiled: bool = False, batch: int = 0) -> RenderSet:
    """Draw shard ``index`` of a split: 100 people, 8 renders each. ``batch`` 0: what suits the device."""
    batch = batch or (32 if torch.device(device).type == "cpu" else 200)
    seed = SPLIT_SEEDS[split] + index
    people = sample_people(SHARD_PEOPLE, seed)
    n = SHARD_PEOPLE * PER_PERSON
    first = torch.arange(n) % PER_PERSON == 0
    labels: dict[str, Any] = dict(sample_nuisances(n, seed).labels)
    for name in ("style", "glasses", "hat", "pose"):
        labels[name][first] = 0
    circumstances = sample_nuisances(n, seed, **labels)
    each = people.repeat_interleave(PER_PERSON, 0).to(device)
    out: list[Renders] = [
        render(each[i : i + batch], circumstances[i : i + batch].to(device), SIZE, compiled=compiled)
        for i in range(0, n, batch)
    ]
    return RenderSet(
        torch.cat([(r.images * 255).round().to(torch.uint8).cpu() for r in out]),
        torch.cat([r.keypoints.cpu() for r in out]),
        torch.cat([r.boxes.cpu() for r in out]),
        torch.cat([(F.avg_pool2d(r.masks, 8) * 255).round().to(torch.uint8).cpu() for r in out]),
        people,
        circumstances.labels,
    )


def shard_path(root: Path, split: str, index: int) -> Path:
    """Where a shard lies."""
    return root / f"{split}-{index:03d}.safetensors"


def write_shard(shard: RenderSet, path: Path) -> None:
    """Write whole or not at all: others may be reading the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"images": shard.images, "keypoints": shard.keypoints, "boxes": shard.boxes, "masks": shard.masks,
               "people": shard.people}  # fmt: skip
    tensors["attributes"] = torch.stack([shard.attributes[k] for k in ATTRIBUTES], 1).to(torch.uint8)
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part)
    part.replace(path)


def read_shard(path: Path) -> RenderSet:
    """Read one shard."""
    t = load_file(path)
    attributes = {k: t["attributes"][:, i].long() for i, k in enumerate(ATTRIBUTES)}
    return RenderSet(t["images"], t["keypoints"], t["boxes"], t["masks"], t["people"], attributes)


def shards(root: Path, split: str) -> list[Path]:
    """The shards of a split that are there, in order."""
    return sorted(root.glob(f"{split}-*.safetensors"))


def load(root: Path, split: str, limit: int | None = None) -> RenderSet:
    """All shards of a split in one set. Raises FileNotFoundError when there is none."""
    paths = shards(root, split)[:limit]
    if not paths:
        raise FileNotFoundError(f"no {split} shards in {root}: run `python -m idgen.training data` first")
    parts = [read_shard(p) for p in paths]
    return RenderSet(
        images=torch.cat([p.images for p in parts]),
        keypoints=torch.cat([p.keypoints for p in parts]),
        boxes=torch.cat([p.boxes for p in parts]),
        masks=torch.cat([p.masks for p in parts]),
        people=torch.cat([p.people for p in parts]),
        attributes={k: torch.cat([p.attributes[k] for p in parts]) for k in ATTRIBUTES},
    )


def make(
    root: Path, counts: dict[str, int], *, device: str = "cpu", compiled: bool = True, part: int = 0, parts: int = 1
) -> Iterator[Path]:
    """Render the missing shards ``part``, ``part + parts``, ... of every split, so that several processes can share
    it.
    """
    todo = [(s, i) for s, n in counts.items() for i in range(n) if not shard_path(root, s, i).exists()]
    for split, index in tqdm([x for x in todo if x[1] % parts == part], desc="rendering", unit="shard"):
        path = shard_path(root, split, index)
        if not path.exists():
            try:
                shard = render_shard(split, index, device=device, compiled=compiled)
            except Exception as error:
                if not compiled:
                    raise
                tqdm.write(f"cannot compile the renderer here ({type(error).__name__}): going on without, slower")
                compiled = False
                shard = render_shard(split, index, device=device)
            write_shard(shard, path)
        yield path
