"""The face detector of mini: boxes, scores and five keypoints in SCRFD's output layout, for synthetic heads.

The layout (insightface/model_zoo/scrfd.py): strides 8, 16, 32; two anchors a cell; an anchor's centre is its cell's
index times the stride; distances from there to the box's four sides and to the keypoints, in strides.

    python -m idgen.training.detector runs/mini/shards --out runs/mini/detector.pt --minutes 20

``benchmarks/mini_faces.py`` measures what comes of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .facedata import FaceSet
from .loop import Loop
from .scenes import Clutter, Scene, compose

STRIDES = (8, 16, 32)
ANCHORS = 2
REACH = ((0.0, 56.0), (40.0, 120.0), (88.0, 1e9))
"""Which sizes of head (longer side of the box, pixels) each stride learns; they overlap, the clearer answer wins.

Finer than SCRFD's: a head of 70 pixels, the usual portrait, is read at stride 16, where a keypoint is a short way off.
"""
CANVASES = (
    (128, 1, 32, 0.20),
    (256, 1, 10, 0.16),
    (384, 1, 4, 0.14),
    (640, 1, 3, 0.10),
    (320, 2, 3, 0.14),
    (128, 5, 3, 0.26),
)
"""Size of the scene in pixels, how many times it is drawn out, batch size, share of the steps. Half of the steps are of
640 pixels, insightface's usual size, whatever the photo's: a portrait of 128 becomes a soft head of 350 there."""


def _unit(width_in: int, width_out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width_in, width_out, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width_out), nn.ReLU())


def _head(width: int, depth: int, outputs: int) -> nn.Sequential:
    last = nn.Conv2d(56, outputs, 1)
    assert last.bias is not None
    nn.init.constant_(last.bias[:ANCHORS], -4.0)  # most cells see nobody (RetinaNet's prior, section 4.1)
    return nn.Sequential(_unit(width, 56), *(_unit(56, 56) for _ in range(depth - 1)), last)


class Detector(nn.Module):
    """Images [n, 3, H, W], ``(pixel - 127.5) / 128``, H and W multiples of 32.

    In training mode returns three maps [n, 30, H/s, W/s]: per anchor 1 score logit, 4 box distances, 10 keypoint
    distances, ordered (score, score, box, box, keypoints, keypoints). In eval mode, for one image, SCRFD's nine
    outputs: scores [m, 1] x 3, boxes [m, 4] x 3, keypoints [m, 10] x 3, with m = H/s * W/s * 2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_unit(3, 16, 2), _unit(16, 24, 2), _unit(24, 32), _unit(32, 48, 2), _unit(48, 48))
        self.middle = nn.Sequential(_unit(48, 64, 2), _unit(64, 64))
        # Dilation lets the coarse cells see heads far larger than a training canvas: det_size 640 on a portrait.
        self.coarse = nn.Sequential(
            _unit(64, 96, 2), _unit(96, 96), _unit(96, 96, 1, 2), _unit(96, 96, 1, 4), _unit(96, 80)
        )
        self.down_to_middle = nn.Conv2d(80, 64, 1)
        self.down_to_fine = nn.Conv2d(64, 48, 1)
        # Back up, as in SCRFD's path aggregation: a coarse cell needs fine edges to place a keypoint inside it.
        self.up_to_middle = nn.Conv2d(48, 64, 2, 2)
        self.up_to_coarse = nn.Conv2d(64, 80, 2, 2)
        outputs = ANCHORS * 15
        self.heads = nn.ModuleList([_head(w, d, outputs) for w, d in ((48, 1), (64, 2), (80, 2))])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        fine = self.fine(images)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        middle = middle + F.interpolate(self.down_to_middle(coarse), scale_factor=2.0, mode="nearest")
        fine = fine + F.interpolate(self.down_to_fine(middle), scale_factor=2.0, mode="nearest")
        middle = middle + self.up_to_middle(fine)
        coarse = coarse + self.up_to_coarse(middle)
        maps = tuple(head(f) for head, f in zip(self.heads, (fine, middle, coarse)))
        if self.training:
            return maps
        score, box, keypoints = [], [], []
        for m in maps:
            rows = m.permute(0, 2, 3, 1)
            score.append(rows[..., :2].sigmoid().reshape(-1, 1))
            box.append(rows[..., 2:10].reshape(-1, 4))
            keypoints.append(rows[..., 10:].reshape(-1, 10))
        return (*score, *box, *keypoints)


def loss_of(maps: tuple[Tensor, ...], scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Focal loss of the scores, and mean error of boxes and keypoints as a share of the head's size.

    Errors are averaged over the cells of each stride first and over the strides then: a stride with few cells, the
    coarsest, is taught as much as the others.
    """
    size = (scene.boxes[..., 2:] - scene.boxes[..., :2]).max(-1).values  # [n, heads]
    middle = scene.keypoints.mean(2)
    focal = torch.zeros((), device=maps[0].device)
    box_errors, point_errors = [], []
    for out, stride, (low, high) in zip(maps, STRIDES, REACH):
        rows, columns = out.shape[2:]
        down, right = (torch.arange(m, device=out.device) * stride for m in (rows, columns))
        y, x = torch.meshgrid(down, right, indexing="ij")
        wanted = scene.present & (size >= low) & (size < high)
        reach = (0.1 * size).clamp(min=0.75 * stride)[..., None, None]
        far = torch.maximum((x - middle[..., 0, None, None]).abs(), (y - middle[..., 1, None, None]).abs())
        near = wanted[..., None, None] & (far < reach)  # [n, heads, rows, columns]
        head = near.float().argmax(1)
        positive = near.any(1)
        # A head just outside this stride's sizes may be found here too: neither right nor wrong.
        slack = scene.present & (size >= 0.75 * low) & (size < 1.35 * high) & ~wanted
        ignored = (slack[..., None, None] & (far < reach)).any(1) & ~positive
        target = positive.float()[:, None].expand(-1, ANCHORS, -1, -1)
        cost = F.binary_cross_entropy_with_logits(out[:, :2], target, reduction="none")
        focal = focal + ((cost * (1 - torch.exp(-cost)) ** 2) * ~ignored[:, None]).sum()
        i, r, c = positive.nonzero(as_tuple=True)
        if len(i):
            h = head[i, r, c]
            here = (torch.stack([c, r], 1) * stride)[:, None]
            box, points, extent = scene.boxes[i, h], scene.keypoints[i, h], size[i, h][:, None, None]
            goal_box = torch.cat([here[:, 0] - box[:, :2], box[:, 2:] - here[:, 0]], 1)[:, None]
            goal_points = (points - here).flatten(1)[:, None]
            found = out[i, :, r, c] * stride
            boxes, keypoints = found[:, 2:10].unflatten(1, (ANCHORS, 4)), found[:, 10:].unflatten(1, (ANCHORS, 10))
            box_errors.append(((boxes - goal_box).abs() / extent).mean())
            point_errors.append(((keypoints - goal_points).abs() / extent).mean())
    focal = focal / scene.present.sum().clamp(min=1)
    if not box_errors:  # a batch of pictures of nobody
        return focal, torch.zeros_like(focal), torch.zeros_like(focal)
    return focal, torch.stack(box_errors).mean(), torch.stack(point_errors).mean()


def train(
    faces: FaceSet,
    minutes: float,
    out: Path,
    start: Path | None = None,
    seed: int = 3,
    rate: float = 3e-3,
    device: str = "cpu",
) -> Detector:
    """Train for so many minutes on scenes composed on the fly, write ``out`` and return it in eval mode.

    start: checkpoint to begin with instead of new weights. An interrupted training goes on from
    ``<out>_training.pt`` when it is started again.
    """
    torch.manual_seed(seed)
    net = Detector().to(device)
    if start is not None:
        net.load_state_dict(torch.load(start, map_location=device, weights_only=True))
    net.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    clutter = Clutter(faces)
    loop = Loop(f"{out.stem}_training", out.parent, {"net": net}, minutes, rate=rate, weight_decay=1e-3, warmup=100)
    torch.manual_seed(seed + 1000 * loop.steps)  # other scenes than before an interruption
    shares = torch.tensor([share for *_, share in CANVASES])
    while loop.going:
        side, factor, batch, _ = CANVASES[int(torch.multinomial(shares, 1))]
        scene = compose(faces, clutter, batch, side).enlarged(factor).to(device)
        pixels = ((scene.images * 255 - 127.5) / 128).contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            maps = net(pixels)
        score, box, points = loss_of(tuple(m.float() for m in maps), scene)
        loop.update(score + 4 * box + 60 * points, batch, score=score.item(), box=box.item(), points=points.item())
    loop.finish()
    save(net, out)
    return net.eval()


def save(net: Detector, out: Path) -> None:
    """Write the checkpoint whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    torch.save({k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}, part)
    part.replace(out)


def load_detector(path: str | Path, device: str = "cpu") -> Detector:
    """The detector of a checkpoint, frozen, in eval mode. Raises ValueError for one of other layers."""
    net = Detector().to(device)
    try:
        net.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    except RuntimeError as error:
        raise ValueError(f"{path} holds other layers than this detector's: train it again ({error})") from error
    net.eval().requires_grad_(False)
    return net


@torch.no_grad()
def best_faces(net: Detector, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The most certain face of each image [n, 3, H, W] (0..255; H, W multiples of 32): score [n], box [n, 4],
    keypoints [n, 5, 2] in pixels. A batched stand-in for insightface where every image shows one head."""
    train_mode, device = net.training, next(net.parameters()).device
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    net.train()  # the maps, not SCRFD's flat outputs, but with the trained statistics
    for norm in norms:
        norm.eval()
    scores, boxes, points = [], [], []
    for part in images.split(64):
        found = []
        for out, stride in zip(net((part.to(device).float() - 127.5) / 128), STRIDES):
            n, _, rows, columns = out.shape
            y, x = torch.meshgrid(torch.arange(rows) * stride, torch.arange(columns) * stride, indexing="ij")
            here = torch.stack([x, y], -1).to(device)[None, :, :, None]  # [1, rows, columns, 1, 2]
            flat = out.permute(0, 2, 3, 1)
            distance = flat[..., 2:10].view(n, rows, columns, 2, 4) * stride
            box = torch.cat([here - distance[..., :2], here + distance[..., 2:]], -1)
            offsets = flat[..., 10:].view(n, rows, columns, 2, 5, 2) * stride
            score = flat[..., :2].sigmoid().reshape(n, -1)
            found.append((score, box.reshape(n, -1, 4), (here[..., None, :] + offsets).reshape(n, -1, 5, 2)))
        score, box, point = (torch.cat(t, 1) for t in zip(*found))
        best = score.argmax(1)
        row = torch.arange(len(best), device=device)
        scores.append(score[row, best].cpu())
        boxes.append(box[row, best].cpu())
        points.append(point[row, best].cpu())
    net.train(train_mode)
    return torch.cat(scores), torch.cat(boxes), torch.cat(points)


def main() -> None:
    """Command line: train the detector and print how it does on the validation people's plain renders."""
    parser = argparse.ArgumentParser(description="Train the face detector of mini.")
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--start", type=Path, help="checkpoint to go on from")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--limit", type=int, help="use only so many shards")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    net = train(FaceSet.read(o.shards, "train", o.limit), o.minutes, o.out, o.start, o.seed, o.rate, o.device)
    faces = FaceSet.read(o.shards, "validation")
    score, _, points = best_faces(net, faces.images)
    error = (points - faces.keypoints).norm(dim=-1).mean()
    print(f"found {(score > 0.5).float().mean():.4f}  keypoint error {error:.2f} px of {faces.images.shape[-1]}")


if __name__ == "__main__":
    main()
