"""A ControlNet as a branch of the sampler: what never changes between steps is computed once per request."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idgen.adapters.attention import AttentionBank, AttentionState
from idgen.adapters.loading import dtype_option
from idgen.errors import BadWeights, WeightsMissing


class _Remembered(nn.Module):
    """Stands in for the control-image embedding and computes it once."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        # A plain attribute in a list: as a submodule it would appear in the model's state dict.
        self._embedding = [embedding]
        self._value: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:
        if self._value is None:
            self._value = self._embedding[0](image)
        return self._value


class ControlRun:
    """One ControlNet during one request. A context manager; on exit the model is as it was."""

    def __init__(
        self, model: Any, image: Tensor, scale: Tensor, tokens: Tensor, guess_mode: bool, backend: str
    ) -> None:
        """image (R, 3, H, W) in 0..1, scale (R,), tokens (R, N, D) for the R rows of the UNet batch."""
        self.model = model
        self.image = image
        self.scale = scale.view(-1, 1, 1, 1)
        self.tokens = tokens
        self.guess_mode = guess_mode
        self.bank = AttentionBank(model, AttentionState(backend=backend))
        self._embedding: nn.Module | None = None

    def __enter__(self) -> ControlRun:
        self.bank.__enter__()
        self._embedding = self.model.controlnet_cond_embedding
        self.model.controlnet_cond_embedding = _Remembered(self._embedding)
        return self

    def __exit__(self, *error: object) -> None:
        self.model.controlnet_cond_embedding = self._embedding
        self.bank.__exit__(*error)

    def residuals(
        self, sample: Tensor, timestep: Tensor, added: dict[str, Tensor] | None
    ) -> tuple[list[Tensor], Tensor]:
        """Residuals for the skip connections and the middle block, already scaled."""
        down, mid = self.model(
            sample,
            timestep,
            encoder_hidden_states=self.tokens,
            controlnet_cond=self.image,
            added_cond_kwargs=added,
            return_dict=False,
        )
        weights = [1.0] * (len(down) + 1)
        if self.guess_mode:
            weights = [10 ** (-1 + k / len(down)) for k in range(len(down) + 1)]
        down = [d * (self.scale * w) for d, w in zip(down, weights)]
        return down, mid * (self.scale * weights[-1])


def load_controlnet(folder: Path | str, device: Any, dtype: Any) -> Any:
    """Load a ControlNet from a diffusers folder.

    Raises:
        WeightsMissing: not there. BadWeights: not a ControlNet, or keys or shapes that do not fit its config.
    """
    from diffusers import ControlNetModel

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise WeightsMissing(f"there is no ControlNet in {folder}: config.json is missing.")
    try:
        model, info = ControlNetModel.from_pretrained(
            folder, **dtype_option(dtype), low_cpu_mem_usage=False, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise BadWeights(f"{folder} is not a ControlNet ({str(error).splitlines()[0]}).") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise BadWeights(f"{folder}: {what.replace('_keys', '')} key {next(iter(info[what]))!r}.")
    return model.to(device).eval().requires_grad_(False)


def resize_control(image: Any, width: int, height: int) -> Tensor:
    """A control image as the ControlNet reads it: (1, 3, height, width) in 0..1, RGB, resized with Lanczos."""
    import numpy as np
    from PIL import Image

    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1).unsqueeze(0).contiguous()


def floor_to(value: int, multiple: int = 8) -> int:
    """The largest multiple not above ``value``."""
    return multiple * math.floor(value / multiple)
