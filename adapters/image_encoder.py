"""The CLIP vision encoder of the IP-Adapter family, with the preprocessing its training used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from idgen.errors import BadWeights, WeightsMissing

# OPENAI_CLIP_MEAN and OPENAI_CLIP_STD of transformers; the adapters were trained with these whatever the encoder.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(image: Image.Image, size: int = 224) -> Tensor:
    """An RGB image as CLIP reads it, (1, 3, size, size): shortest edge to ``size`` by PIL bicubic, cut to the middle.

    The default settings of transformers' ``CLIPImageProcessor``; written out here because its newer backends resize
    differently from PIL.
    """
    image = image.convert("RGB")
    width, height = image.size
    if width <= height:
        resized = (size, int(size * height / width))
    else:
        resized = (int(size * width / height), size)
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    array = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    array = (array - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(array).permute(2, 0, 1).unsqueeze(0).contiguous()


class ImageEncoder:
    """A CLIP vision model with projection."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.size = int(model.config.image_size)

    @classmethod
    def load(cls, folder: Path | str, device: Any, dtype: Any) -> ImageEncoder:
        """Load from a transformers folder.

        Raises:
            WeightsMissing: not there. BadWeights: not a CLIP vision model with projection, or damaged.
        """
        from transformers import CLIPVisionModelWithProjection
        from transformers.utils import logging

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise WeightsMissing(f"there is no image encoder in {folder}: config.json is missing.")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True
            )
            model, info = loaded
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise BadWeights(f"{folder} is not a CLIP image encoder ({type(error).__name__}: {first}).") from None
        finally:
            logging.enable_progress_bar()
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            wrong = [k for k in info[what] if not str(k).endswith("position_ids")]
            if wrong:
                raise BadWeights(
                    f"{folder} is not the image encoder its config describes: {what[:-5]} key {wrong[0]!r}."
                )
        return cls(model.to(device).eval().requires_grad_(False))

    @torch.no_grad()
    def embed(self, images: list[Image.Image]) -> Tensor:
        """Projected image embeddings (B, D), not normalised."""
        return self.model(self._pixels(images)).image_embeds

    @torch.no_grad()
    def patches(self, images: list[Image.Image]) -> Tensor:
        """All tokens entering the last layer, (B, S, W): patches and class token, without the final norm."""
        return self.model(self._pixels(images), output_hidden_states=True).hidden_states[-2]

    @torch.no_grad()
    def blank_patches(self) -> Tensor:
        """:meth:`patches` of pixels that are zero after normalisation, (1, S, W): the unconditional input."""
        pixels = torch.zeros(1, 3, self.size, self.size, device=self.model.device, dtype=self.model.dtype)
        return self.model(pixels, output_hidden_states=True).hidden_states[-2]

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        pixels = torch.cat([clip_pixels(image, self.size) for image in images])
        return pixels.to(self.model.device, self.model.dtype)
