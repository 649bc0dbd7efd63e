"""The two face recognisers of mini: one whose embedding conditions the generator, one that only scores.

Both map an aligned 112x112 crop to a 512-d embedding. They share no weights, no architecture, no seed and no order of
data, so that the second can judge portraits made from the embedding of the first. Both learn by CosFace (Wang et al.,
2018, eq. 4). The first also regresses the renderer's identity parameters: that makes the embedding easy to decode into
a face, which is what a generator has to do with it.

    python -m idgen.training.recogniser runs/mini/shards --out runs/mini/recogniser.pt --minutes 10
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .facedata import FaceSet, align, jitter_keypoints

DIM = 512
SCALE, MARGIN = 24.0, 0.30
"""CosFace's s and m. 64 and .35 of the paper are for a million people; with a few thousand they saturate early."""


def _unit(width_in: int, width_out: int, stride: int = 1, kernel: int = 3, groups: int = 1) -> list[nn.Module]:
    """Convolution and batch norm."""
    conv = nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(width_out)]


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut; the shortcut averages and projects where the size changes."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_unit(width_in, width_out, stride), nn.ReLU(), *_unit(width_out, width_out))
        same = stride == 1 and width_in == width_out
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(nn.AvgPool2d(stride, stride), *_unit(width_in, width_out, 1, 1))
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


class Recogniser(nn.Module):
    """The conditioning recogniser: crops [n, 3, 112, 112] in -1..1 -> raw embeddings [n, 512], norm about 22."""

    def __init__(self, widths: tuple[int, ...] = (24, 32, 64, 128)) -> None:
        super().__init__()
        a, b, c, d = widths
        self.stem = nn.Sequential(*_unit(3, a, 4, 7), nn.ReLU())  # 28x28 at once: the CPU's time goes here
        self.body = nn.Sequential(
            Residual(a, b, 1), Residual(b, c, 2), Residual(c, c, 1), Residual(c, d, 2), Residual(d, d, 1)
        )
        self.pool = nn.Sequential(nn.Conv2d(d, d, 7, groups=d, bias=False), nn.BatchNorm2d(d))
        self.embed = nn.Linear(d, DIM, bias=False)
        self.norm = nn.BatchNorm1d(DIM, affine=False)  # fixes the embedding's norm near sqrt(512), like ArcFace's

    def forward(self, crops: Tensor) -> Tensor:
        features = self.body(self.stem(crops))
        return self.norm(self.embed(self.pool(features.float()).flatten(1)))


class Scorer(nn.Module):
    """The scoring recogniser: another family of network (patches, plain convolutions, pooled by rows)."""

    def __init__(self, widths: tuple[int, ...] = (40, 64, 96, 160)) -> None:
        super().__init__()
        a, b, c, d = widths
        layers = [nn.Conv2d(3, a, 4, 4), nn.SiLU()]
        for width_in, width_out, stride in ((a, b, 2), (b, c, 1), (c, c, 1), (c, d, 2), (d, d, 1)):
            layers += [*_unit(width_in, width_out, stride), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.embed = nn.Linear(d * 7, DIM, bias=False)
        self.norm = nn.BatchNorm1d(DIM, affine=False)

    def forward(self, crops: Tensor) -> Tensor:
        # Keep how high on the face a feature lies, not where sideways: the pose moves that.
        return self.norm(self.embed(self.body(crops).float().mean(3).flatten(1)))


ARCHITECTURES: dict[str, type[nn.Module]] = {"recogniser": Recogniser, "scorer": Scorer}


def load_recogniser(path: str | Path, device: str = "cpu") -> nn.Module:
    """The network of a checkpoint that :func:`train` wrote, frozen, in eval mode."""
    state = torch.load(path, map_location=device, weights_only=True)
    net = ARCHITECTURES[state["kind"]]().to(device)
    net.load_state_dict(state["net"])
    return net.eval().requires_grad_(False)


@torch.no_grad()
def embed(net: nn.Module, images: Tensor, keypoints: Tensor, batch: int = 128) -> Tensor:
    """Raw embeddings [n, 512] of images [n, 3, H, W] (0..255) by their keypoints [n, 5, 2]; ``net`` in eval mode."""
    device = next(net.parameters()).device
    pairs = zip(images.split(batch), keypoints.split(batch))
    return torch.cat([net(align(i.to(device), k.to(device).float())).cpu() for i, k in pairs])


def augment(crops: Tensor) -> Tensor:
    """What cameras, files and generators do to a crop: blur, exposure, tint, contrast, noise, a covered patch."""
    n, device = len(crops), crops.device
    pick = torch.rand(n, device=device)
    soft = F.interpolate(F.avg_pool2d(crops, 2), scale_factor=2.0, mode="bilinear")
    softer = F.interpolate(F.avg_pool2d(crops, 4), scale_factor=4.0, mode="bilinear")
    crops = torch.where((pick < 0.25)[:, None, None, None], soft, crops)
    crops = torch.where((pick < 0.05)[:, None, None, None], softer, crops)
    exposure = 0.85 + 0.3 * torch.rand(n, 1, 1, 1, device=device)
    tint = 0.07 * torch.randn(n, 3, 1, 1, device=device)
    noise = 0.05 * torch.rand(n, 1, 1, 1, device=device) * torch.randn_like(crops)
    crops = crops * exposure + tint + noise
    size, top, left = (int(torch.randint(low, high, ())) for low, high in ((8, 40), (0, 80), (0, 80)))
    covered = torch.rand(n, device=device) < 0.1
    crops[covered, :, top : top + size, left : left + size] = torch.rand((), device=device) * 2 - 1
    return crops


def train(
    faces: FaceSet,
    kind: str = "recogniser",
    minutes: float = 10.0,
    out: Path | None = None,
    start: Path | None = None,
    seed: int = 1,
    batch: int = 128,
    rate: float = 2e-3,
    regress: float = 4.0,
    device: str = "cpu",
) -> nn.Module:
    """Train a recogniser for so many minutes, write it to ``out`` and return it in eval mode.

    start: checkpoint to go on from (the class centres are then taken from its embeddings). regress: weight of the
    regression of the identity parameters, 0 switches it off. The learning rate falls to 0 along half a cosine over
    the given time, so a run that is cut short is worth less than a shorter run.
    """
    torch.manual_seed(seed)
    people = len(faces.parameters)
    goal = (faces.parameters - faces.parameters.mean(0)) / faces.parameters.std(0).clamp(min=1e-4)
    goal = goal.to(device)
    net = ARCHITECTURES[kind]().to(device)
    centres = F.normalize(torch.randn(people, DIM), dim=1)
    if start is not None:
        net.load_state_dict(torch.load(start, map_location=device, weights_only=True)["net"])
        net.eval()
        some = torch.randperm(len(faces))[: 4 * people]
        found = torch.zeros(people, DIM).index_add_(
            0, faces.person[some], F.normalize(embed(net, faces.images[some], faces.keypoints[some]), dim=1)
        )
        missing = found.norm(dim=1, keepdim=True) == 0
        centres = F.normalize(torch.where(missing, centres, found), dim=1)
    centre = nn.Parameter(centres.to(device))
    read = nn.Linear(DIM, goal.shape[1]).to(device)
    net.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = [
        {"params": [*net.parameters(), *read.parameters()], "weight_decay": 5e-3},
        {"params": [centre], "weight_decay": 1e-4},
    ]
    optimiser = torch.optim.AdamW(groups, lr=rate)
    photos = (faces.style == 0).nonzero().flatten()
    begun, step = time.monotonic(), 0
    mean = {"loss": 0.0, "right": 0.0, "error": 0.0}
    while (done := (time.monotonic() - begun) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-6
        mostly = photos[torch.randint(0, len(photos), (batch,))] if len(photos) else torch.zeros(batch).long()
        pick = torch.where(torch.rand(batch) < 0.5, mostly, torch.randint(0, len(faces), (batch,)))
        who, photo = faces.person[pick].to(device), (faces.style[pick] == 0).to(device)
        crops = align(faces.images[pick].to(device), jitter_keypoints(faces.keypoints[pick]).to(device))
        crops = augment(crops).contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            features = net(crops)
        unit = F.normalize(features.float(), dim=1)
        cosine = unit @ F.normalize(centre, dim=1).T
        loss = F.cross_entropy(SCALE * (cosine - MARGIN * F.one_hot(who, people)), who)
        error = torch.zeros((), device=device)
        if regress:
            # Drawn styles hide colours, so they count less: the reader must not hedge on photos because of them.
            weight = torch.where(photo, 1.0, 0.15)
            miss = (read(unit * DIM**0.5) - goal[who]).pow(2).mean(1)
            error = (miss * weight).sum() / weight.sum()
        optimiser.zero_grad()
        (loss + regress * error).backward()
        optimiser.step()
        step += 1
        right = (cosine.argmax(1) == who).float().mean()
        for name, value in (("loss", loss), ("right", right), ("error", error)):
            mean[name] += (value.item() - mean[name]) * max(0.02, 1 / step)
        if step % 50 == 0:
            spent = time.monotonic() - begun
            report = "  ".join(f"{k} {v:.3f}" for k, v in mean.items())
            print(f"{kind} step {step}  {spent:.0f} s  {spent / step:.3f} s/step  {report}", flush=True)
    if out is not None:
        _save(net, kind, out)
    return net.eval()


def _save(net: nn.Module, kind: str, out: Path) -> None:
    """Write the checkpoint whole or not at all: others may be reading it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    state = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    torch.save({"kind": kind, "net": state}, part)
    part.replace(out)


@torch.no_grad()
def evaluate(net: nn.Module, faces: FaceSet, keypoints: Tensor | None = None) -> dict[str, float]:
    """How well people are told apart: the first render of each person as the reference, all others as queries.

    keypoints: other keypoints than the true ones, for instance a detector's. Returns the mean cosine to the own and to
    the others' references, balanced accuracy at the best threshold, rank-1, and the same for the photo style alone.
    """
    net.eval()
    unit = F.normalize(embed(net, faces.images, faces.keypoints if keypoints is None else keypoints), dim=1)
    people = len(faces.parameters)
    first = torch.tensor([int((faces.person == p).nonzero()[0]) for p in range(people)])
    query = torch.ones(len(faces), dtype=torch.bool)
    query[first] = False
    found: dict[str, float] = {}
    for name, chosen in (("all", query), ("photo", query & (faces.style == 0))):
        cosine, who = unit[chosen] @ unit[first].T, faces.person[chosen]
        own = cosine[torch.arange(len(who)), who]
        others = cosine[F.one_hot(who, people) == 0]
        cuts = torch.linspace(-0.2, 0.9, 111)
        accuracy = torch.stack([((own >= c).float().mean() + (others < c).float().mean()) / 2 for c in cuts])
        found |= {
            f"{name}_own": float(own.mean()),
            f"{name}_others": float(others.mean()),
            f"{name}_accuracy": float(accuracy.max()),
            f"{name}_rank1": float((cosine.argmax(1) == who).float().mean()),
        }
    return found


def main() -> None:
    """Command line: train one of the two recognisers and print how well it does on the validation people."""
    parser = argparse.ArgumentParser(description="Train a face recogniser of mini.")
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", choices=sorted(ARCHITECTURES), default="recogniser")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--start", type=Path, help="checkpoint to go on from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--regress", type=float, default=4.0, help="weight of regressing the identity parameters")
    parser.add_argument("--limit", type=int, help="use only so many shards")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    net = train(
        FaceSet.read(o.shards, "train", o.limit), o.kind, o.minutes, o.out, o.start, o.seed,
        rate=o.rate, regress=o.regress, device=o.device,
    )  # fmt: skip
    found = evaluate(net, FaceSet.read(o.shards, "validation"))
    print("  ".join(f"{k} {v:.3f}" for k, v in found.items()))


if __name__ == "__main__":
    main()
