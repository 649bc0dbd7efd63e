"""Where and how the stages of one training run work."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from .workers import Workers


@dataclass
class Run:
    """Where and how a stage runs. ``minutes`` is the stage's own budget; ``workers``: CPU processes for the long
    stages.
    """

    root: Path
    device: str = "cpu"
    minutes: float = 1.0
    workers: int = 3
    shards: int = 0
    group: Workers = field(default_factory=Workers)

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return torch.device(self.device).type

    def has(self, name: str) -> bool:
        """Whether a result is there."""
        return (self.root / name).exists()
