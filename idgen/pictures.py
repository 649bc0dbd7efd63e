"""What a picture handed in is, and as the tensors that the sampler takes."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from idgen.errors import BadRequest
from idgen.images import open_photo


def is_picture(pose: Any) -> bool:
    """Whether ``pose`` is a picture rather than keypoints: a file, bytes, a PIL image or an (H, W, C) array."""
    if isinstance(pose, (str, os.PathLike, bytes, Image.Image)):
        return True
    return getattr(pose, "ndim", 0) == 3


def is_drawing(picture: Any) -> bool:
    """Whether a picture is a keypoint drawing: it is made of the drawing's colours alone, or nearly all black.

    The colours are 0, 255 and 153 (the limbs' 0.6 x 255) in each channel; the second rule admits lossy copies.
    """
    array = np.asarray(picture)
    if np.isin(array, (0, 153, 255)).all():
        return bool((array.max(axis=-1) == 0).any())
    return bool((array.max(axis=-1) < 16).mean() > 0.5 and (array > 239).any())


def pixels_of(image: Any, width: int, height: int) -> Tensor:
    """A picture as the VAE's encoder takes it, (1, 3, height, width) in 0..1; a tensor of that shape passes through."""
    if isinstance(image, Tensor):
        if image.ndim != 4 or image.shape[1] != 3:
            raise BadRequest(
                f"image is a tensor of shape {tuple(image.shape)}; it must be (1, 3, H, W) in 0..1.", "image"
            )
        return image
    photo = open_photo(image)
    if photo.size != (width, height):
        photo = photo.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255


def mask_of(mask: Any, width: int, height: int) -> Tensor:
    """A mask at latent resolution, (1, 1, h, w) of 0 or 1; white may change."""
    small = open_photo(mask).convert("L").resize((width, height), Image.Resampling.BOX)
    return (torch.from_numpy(np.array(small)).float() / 255 >= 0.5).float()[None, None]
