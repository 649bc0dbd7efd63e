"""A ControlNet as a branch of the sampler: what never changes between steps is computed once per request."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idgen.adapters.attention import AttentionBank, AttentionState
from idgen.adapters.lean import LeanBlocks
from idgen.adapters.loading import dtype_option
from idgen.adapters.remember import Remembered, first_if_equal
from idgen.errors import BadWeights, WeightsMissing


class _Embedded(nn.Module):
    """Stands in for the control-image embedding: the image does not change between steps, so neither does this."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        # A plain attribute in a list: as a buffer it would appear in the model's state dict.
        self._value = [value]

    def forward(self, image: Tensor) -> Tensor:
        return self._value[0]


class ControlRun:
    """One ControlNet during one request. A context manager; on exit the model is as it was."""

    def __init__(
        self,
        model: Any,
        image: Tensor,
        scale: Tensor,
        tokens: Tensor,
        guess_mode: bool,
        backend: str,
        *,
        half: bool = False,
        lean: bool = True,
    ) -> None:
        """image (R, 3, H, W) in 0..1, scale (R,) on any device, tokens (R, N, D) for the R rows of the UNet batch.

        Args:
            half: R is the conditional half only; the unconditional rows get no residuals.
            lean: see :class:`idgen.adapters.lean.LeanBlocks`.
        """
        self.model = model
        self.image = image
        self.tokens = tokens
        self.half = half
        self.weights: list[Any]
        if not guess_mode and bool((scale == scale[0]).all()):
            self.weights = [float(scale[0])]
        else:
            column = scale.view(-1, 1, 1, 1).to(image.device, image.dtype)
            last = _count_residuals(model) - 1
            self.weights = [column * 10 ** (-1 + k / last) for k in range(last + 1)] if guess_mode else [column]
        self.bank = AttentionBank(model, AttentionState(backend=backend, lean=lean))
        self._lean = lean
        self._embedding: nn.Module | None = None
        self._stack = ExitStack()

    def __enter__(self) -> ControlRun:
        self._embedding = self.model.controlnet_cond_embedding
        if next(self._embedding.parameters()).device == self.image.device:
            image = first_if_equal(self.image)
            self.model.controlnet_cond_embedding = _Embedded(self._embedding(image))
        self._stack.enter_context(self.bank)
        self.bank.prepare(self.tokens)
        if self._lean:
            self._stack.enter_context(LeanBlocks(self.model))
            self._stack.enter_context(Remembered(self.model.add_embedding, self.model.add_time_proj))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self.model.controlnet_cond_embedding = self._embedding

    def residuals(
        self, sample: Tensor, timestep: Tensor, added: dict[str, Tensor] | None
    ) -> tuple[list[Tensor], Tensor]:
        """Residuals for the skip connections and the middle block, already scaled."""
        if self.half:
            rows = len(sample) // 2
            sample = sample[rows:]
            added = None if added is None else {name: value[rows:] for name, value in added.items()}
        down, mid = self.model(
            sample,
            timestep,
            encoder_hidden_states=self.tokens,
            controlnet_cond=self.image,
            added_cond_kwargs=added,
            return_dict=False,
        )
        weights = self.weights if len(self.weights) > 1 else self.weights * (len(down) + 1)
        scaled = [r if isinstance(w, float) and w == 1.0 else r * w for r, w in zip([*down, mid], weights)]
        if self.half:
            scaled = [torch.cat([torch.zeros_like(r), r]) for r in scaled]
        return scaled[:-1], scaled[-1]


def _count_residuals(model: Any) -> int:
    return len(model.controlnet_down_blocks) + 1


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
