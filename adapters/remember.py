"""Parts of a model that see the same input at every step, computed once; and deep blocks kept over a few steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Remembered:
    """A module's output kept from its first call, or given beforehand, until the context ends.

    The forward of the instance is replaced and the module itself stays where it is: nothing appears in a state dict.
    """

    def __init__(self, *modules: nn.Module | None) -> None:
        self.modules = [m for m in modules if m is not None and "forward" not in m.__dict__]

    def __enter__(self) -> Remembered:
        for module in self.modules:
            module.forward = _once(module)
        return self

    def __exit__(self, *_: object) -> None:
        for module in self.modules:
            del module.forward


def _once(module: nn.Module) -> Any:
    compute = module.forward
    kept: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(compute(*args, **kwargs))
        return kept[0]

    return forward


class FeatureCache:
    """DeepCache (arXiv:2312.00858): between fresh steps only the outermost blocks of the UNet run.

    Everything from the second down block to the last but one up block returns what it returned at the last fresh step;
    features there change slowly from step to step. Set :attr:`fresh` before each call of the UNet.
    """

    def __init__(self, unet: Any) -> None:
        middle = [unet.mid_block] if unet.mid_block is not None else []
        self.blocks = [*unet.down_blocks[1:], *middle, *unet.up_blocks[:-1]]
        self.fresh = True
        self._kept: dict[int, Any] = {}

    def __enter__(self) -> FeatureCache:
        for number, block in enumerate(self.blocks):
            block.forward = self._cached(number, block.forward)
        return self

    def _cached(self, number: int, compute: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.fresh or number not in self._kept:
                self._kept[number] = compute(*args, **kwargs)
            return self._kept[number]

        return forward

    def __exit__(self, *_: object) -> None:
        for block in self.blocks:
            del block.forward
        self._kept.clear()


def first_if_equal(rows: Tensor) -> Tensor:
    """One row where all are equal, so that what is computed from it is computed once and broadcast."""
    return rows[:1] if len(rows) > 1 and bool((rows[1:] == rows[:1]).all()) else rows
