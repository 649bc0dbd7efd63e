"""Aligned face crops and labelled renders: what the recognisers, the detector and the attribute reader train on.

Coordinates: keypoints and boxes are in pixels from the image's top left *edge*, so that they scale with the image.
The five keypoints are in insightface's order: the eye on the image's left, the other eye, nose tip, left and right
mouth corner.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import PER_PERSON, load
from .heads import identity_parameters

CROP = 112
"""Side of an aligned crop in pixels; insightface routes a one-input 112x112 model to its ArcFace class."""

TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Where the five keypoints lie in an aligned crop [5, 2] (insightface/utils/face_align.py, ``arcface_dst``)."""


@dataclass
class FaceSet:
    """Labelled renders in memory.

    images: uint8 [n, 3, S, S]; keypoints: float [n, 5, 2]; boxes: float [n, 4] as x0, y0, x1, y1;
    person: long [n], row of ``parameters``; style: long [n], 0 is the photo style;
    parameters: float [people, K], what makes the person; attributes: long [n] each, by name.
    """

    images: Tensor
    keypoints: Tensor
    boxes: Tensor
    person: Tensor
    style: Tensor
    parameters: Tensor
    attributes: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @staticmethod
    def read(root: Path, split: str, limit: int | None = None) -> FaceSet:
        """The shards of a split ("train", "validation" or "test"). Raises FileNotFoundError when there is none."""
        renders = load(root, split, limit)
        return FaceSet(
            images=renders.images,
            keypoints=renders.keypoints.float(),
            boxes=renders.boxes.float(),
            person=torch.arange(len(renders)) // PER_PERSON,
            style=renders.attributes["style"],
            parameters=identity_parameters(renders.people).float(),
            attributes=renders.attributes,
        )


def similarity(keypoints: Tensor, target: Tensor | None = None) -> Tensor:
    """The least-squares similarity transform that takes keypoints [n, 5, 2] to the crop: [n, 2, 3].

    Umeyama's solution; in two dimensions and without reflection it is one complex division, because a rotation with
    scale is multiplication by a complex number. The same matrix as insightface's ``estimate_norm``.
    """
    goal = (TEMPLATE if target is None else target).to(keypoints)
    centre, goal_centre = keypoints.mean(1, keepdim=True), goal.mean(0)
    p, q = torch.view_as_complex((keypoints - centre).contiguous()), torch.view_as_complex(goal - goal_centre)
    turn = (p.conj() * q).sum(1) / (p.abs() ** 2).sum(1).clamp(min=1e-6)
    linear = torch.stack([torch.stack([turn.real, -turn.imag], 1), torch.stack([turn.imag, turn.real], 1)], 1)
    shift = goal_centre[None, :, None] - linear @ centre.transpose(1, 2)
    return torch.cat([linear, shift], 2)


def align(images: Tensor, keypoints: Tensor, size: int = CROP) -> Tensor:
    """Aligned crops in -1..1, [n, 3, size, size], from images [n, 3, H, W] in 0..255 and keypoints [n, 5, 2] in pixels.

    As insightface's ``norm_crop``: bilinear, black outside the image; ``(pixel - 127.5) / 127.5``, RGB.
    """
    n, _, height, width = images.shape
    matrix = similarity(keypoints, TEMPLATE * (size / CROP))
    linear, shift = matrix[:, :, :2], matrix[:, :, 2:]
    inverse = torch.linalg.inv(linear)
    steps = torch.arange(size, device=images.device, dtype=torch.float32)
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    places = inverse @ (torch.stack([u.flatten(), v.flatten()])[None] - shift)  # [n, 2, size * size], pixels
    scale = torch.tensor([[2 / (width - 1)], [2 / (height - 1)]], device=images.device)
    grid = (places * scale - 1).transpose(1, 2).reshape(n, size, size, 2)
    # grid_sample pads with 0, so shift the range first: the border must come out as black, -1.
    crops = F.grid_sample(images.float() / 127.5, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return crops - 1


def jitter_keypoints(keypoints: Tensor, point: float = 0.012, common: float = 0.012) -> Tensor:
    """Keypoints [n, 5, 2] as a detector would misplace them.

    point: standard deviation of each point's own error; common: of a shift of all five and, with a scale of three, of
    a turn (radians) and a change of size; both in units of the distance between the eyes' centre and the mouth.
    """
    n = len(keypoints)
    eyes, mouth = keypoints[:, :2].mean(1), keypoints[:, 3:].mean(1)
    unit = (eyes - mouth).norm(dim=1).clamp(min=4)[:, None, None] * 2
    centre = keypoints.mean(1, keepdim=True)
    angle, grow = (3 * common * torch.randn(2, n, 1, 1)).to(keypoints).unbind(0)
    offset = keypoints - centre
    turned = torch.cat([offset[..., :1] - angle * offset[..., 1:], offset[..., 1:] + angle * offset[..., :1]], 2)
    own = point * torch.randn(n, 5, 2).to(keypoints)
    shift = common * torch.randn(n, 1, 2).to(keypoints)
    return centre + turned * (1 + grow) + unit * (own + shift)
