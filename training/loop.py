"""What every stage's training loop shares: time budget, learning rate, averaging, resuming, logs and curves."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .optim import Optimiser
from .sheets import save_curve
from .workers import Workers


class Loop:
    """A time-budgeted run of optimiser steps over ``modules``.

    The budget counts training time only and survives an interruption: a run that is started again with the same name
    goes on where its last checkpoint was. The learning rate warms up, holds and falls linearly over the last
    ``decay`` of the budget. ``average`` holds an exponential moving average of all trainable parameters.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        modules: dict[str, nn.Module],
        minutes: float,
        *,
        rate: float,
        workers: Workers | None = None,
        muon: bool = True,
        weight_decay: float = 0.01,
        decay: float = 0.5,
        warmup: int = 40,
        averaging: float = 0.998,
        save_every: float = 120.0,
        on_save: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.name, self.root, self.modules, self.seconds = name, root, modules, max(minutes * 60, 1e-3)
        self.workers = workers or Workers()
        self.rate, self.decay, self.warmup, self.averaging = rate, decay, warmup, averaging
        self.save_every, self.on_save = save_every, on_save
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimiser = Optimiser(self.parameters, self.workers, muon=muon, weight_decay=weight_decay)
        self.steps = self.samples = 0
        self.spent = 0.0
        self.smooth: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self._resume()
        self.workers.share([p.data for m in modules.values() for p in (*m.parameters(), *m.buffers())])
        if not hasattr(self, "average"):
            self.average = [p.detach().clone() for p in self.parameters]
        self._begun = time.monotonic() - self.spent
        self._saved = time.monotonic()
        self.fraction = min(1.0, self.spent / self.seconds)
        self._bar = tqdm(
            total=100,
            initial=int(100 * self.fraction),
            desc=name,
            disable=not self.workers.first,
            unit="%",
            mininterval=5 if sys.stderr.isatty() else 60,
        )

    @property
    def checkpoint(self) -> Path:
        """The file that a resumed run starts from."""
        return self.root / f"{self.name}.pt"

    @property
    def going(self) -> bool:
        """Whether there is budget left."""
        return self.fraction < 1

    def update(self, loss: Tensor, samples: int, **shown: float) -> None:
        """Backward and one optimiser step. ``samples``: batch size of this worker. ``shown``: numbers for the log."""
        loss.backward()
        shown = {"loss": float(loss.detach()), **shown}
        now = (time.monotonic() - self._begun) / self.seconds
        numbers = torch.tensor([*shown.values(), now], dtype=torch.float32, device=loss.device)
        after = self.fraction
        falling = 1.0 if after < 1 - self.decay else max(0.02, (1 - after) / self.decay)
        _, averaged = self.optimiser.step(self.rate * min(1.0, (self.steps + 1) / self.warmup) * falling, numbers)
        assert averaged is not None  # it was given numbers
        *values, self.fraction = averaged.tolist()
        self.steps += 1
        self.samples += samples * self.workers.count
        keep = min(self.averaging, (self.steps + 1) / (self.steps + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)
        for key, value in zip(shown, values):
            self.smooth[key] = value + (self.smooth.get(key, value) - value) * min(0.97, 1 - 1 / self.steps)
        if self.workers.first:
            self._bar.update(min(100, int(100 * self.fraction)) - self._bar.n)
            if self.steps % 10 == 0:
                self._bar.set_postfix(step=self.steps, **{k: f"{v:.4f}" for k, v in self.smooth.items()}, refresh=False)
        # Everybody takes part in a save: evaluation may use collective calls, and nobody must run ahead.
        due = torch.tensor([float(time.monotonic() - self._saved > self.save_every)])
        if self.steps % 20 == 0 and self.workers.mean_(due).item() > 0.5:
            self.save()

    def swap(self) -> None:
        """Exchange the raw parameters and their average; call again to go back."""
        for p, q in zip(self.parameters, self.average):
            held = p.data.clone()
            p.data.copy_(q)
            q.copy_(held)

    def save(self) -> None:
        """Evaluate (with the averaged weights), log, draw the curve and write the checkpoint."""
        self._saved = time.monotonic()
        if not self.workers.first:
            return
        self.spent = time.monotonic() - self._begun
        extra: dict[str, float] = {}
        if self.on_save is not None:
            self.swap()
            with torch.no_grad():
                extra = self.on_save()
            self.swap()
        entry = {"samples": self.samples, "seconds": round(self.spent, 1), **self.smooth, **extra}
        self.history.append(entry)
        tqdm.write(f"{self.name} " + "  ".join(f"{k} {v:.4g}" for k, v in entry.items()))
        self.root.mkdir(parents=True, exist_ok=True)
        for key in ("loss", *extra):
            points = [(h["samples"], h[key]) for h in self.history if key in h]
            save_curve(points, self.root / f"{self.name}-{key}.png", f"{self.name}: {key} over samples")
        (self.root / f"{self.name}.json").write_text(json.dumps(self.history, indent=1))
        state: dict[str, Any] = {
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "steps": self.steps,
            "samples": self.samples,
            "spent": self.spent,
            "smooth": self.smooth,
            "history": self.history,
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        device = self.parameters[0].device if self.parameters else "cpu"
        state = torch.load(self.checkpoint, map_location=device, weights_only=True)
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        for key in ("steps", "samples", "spent", "smooth", "history"):
            setattr(self, key, state[key])

    def finish(self) -> None:
        """Write the last checkpoint and leave the averaged weights in the modules."""
        if self.steps:
            self.save()
        self.workers.share(self.average)
        for p, q in zip(self.parameters, self.average):
            p.data.copy_(q)
        self._bar.close()


def load_averaged(path: Path, modules: dict[str, nn.Module]) -> int:
    """Put a checkpoint's averaged weights into ``modules`` (as they were given to the loop); returns its samples."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key, module in modules.items():
        module.load_state_dict(state["modules"][key])
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    for p, q in zip(parameters, state["average"]):
        p.data.copy_(q)
    return int(state["samples"])
