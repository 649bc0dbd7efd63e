"""Muon for the weight matrices and AdamW for the rest, shared over workers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .workers import Workers

LARGEST = 256
"""Matrices whose smaller side is longer are left to AdamW: on a CPU their orthogonalisation costs more than it
brings.
"""


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix to ``g`` [m, n], roughly, by a quintic Newton-Schulz iteration.

    Constants and method: Keller Jordan, "Muon: an optimizer for hidden layers" (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    flip = x.shape[0] > x.shape[1]
    if flip:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return (x.T if flip else x).to(g.dtype)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient, once :meth:`Optimiser.step` has seen to it that there is one."""
    assert parameter.grad is not None
    return parameter.grad


class Optimiser:
    """Gradient averaging over workers, clipping, Muon or AdamW steps.

    With ``muon`` every weight of two or more dimensions (a convolution as [out, in * k * k]) is updated by the
    orthogonalised momentum, scaled by .2 sqrt(max(m, n)) so that AdamW's learning rates carry over (Liu et al., "Muon
    is scalable for LLM training", 2025); each worker orthogonalises its share of the matrices.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        workers: Workers,
        *,
        muon: bool = True,
        weight_decay: float = 0.01,
        clip: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.workers, self.weight_decay, self.clip = workers, weight_decay, clip
        self.matrices = [p for p in self.parameters if muon and p.ndim >= 2 and 8 <= self._narrow(p) <= LARGEST]
        chosen = {id(p) for p in self.matrices}
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        others = [p for p in self.parameters if id(p) not in chosen]
        # Learning rates are Muon's; AdamW takes less for whole matrices, and bears as much for biases and gains.
        groups = [
            {"params": [p for p in others if p.ndim < 2], "share": 1.0},
            {"params": [p for p in others if p.ndim >= 2], "share": 0.3 if muon else 1.0},
        ]
        self.rest = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=1e-3, betas=betas, weight_decay=weight_decay
        )
        # Deal the matrices out by size, largest first, to whoever has least to do.
        load = [0.0] * workers.count
        self.owner: dict[int, int] = {}
        for i in sorted(range(len(self.matrices)), key=lambda i: -self._cost(self.matrices[i])):
            rank = min(range(workers.count), key=load.__getitem__)
            self.owner[i] = rank
            load[rank] += self._cost(self.matrices[i])

    @staticmethod
    def _narrow(p: Tensor) -> int:
        return min(p.shape[0], p.numel() // p.shape[0])

    @staticmethod
    def _cost(p: Tensor) -> float:
        m, n = p.shape[0], p.numel() // p.shape[0]
        return float(min(m, n) ** 2 * max(m, n))

    def step(self, rate: float, extra: Tensor | None = None) -> tuple[float, Tensor | None]:
        """Average, clip and apply the gradients with learning rate ``rate``.

        ``extra`` [k] rides along with the gradients and comes back averaged. Returns the gradient norm and ``extra``.
        """
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.workers.count > 1:
            gradients = [_gradient(p) for p in self.parameters]
            flat = torch.cat([g.flatten() for g in gradients] + ([extra] if extra is not None else []))
            self.workers.mean_(flat)
            at = 0
            for g in gradients:
                g.copy_(flat[at : at + g.numel()].view_as(g))
                at += g.numel()
            extra = flat[at:].clone() if extra is not None else None
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for group in self.rest.param_groups:
            group["lr"] = rate * group["share"]
        self.rest.step()
        self._matrix_step(rate)
        for p in self.parameters:
            p.grad = None
        return float(norm), extra

    @torch.no_grad()
    def _matrix_step(self, rate: float) -> None:
        if not self.matrices:
            return
        updates = [torch.zeros_like(p) for p in self.matrices]
        for i, (p, m) in enumerate(zip(self.matrices, self.momentum)):
            gradient = _gradient(p)
            m.lerp_(gradient, 0.05)
            if self.owner[i] == self.workers.rank:
                g = gradient.lerp(m, 0.95).reshape(p.shape[0], -1)
                updates[i].copy_((orthogonalise(g) * (0.2 * max(g.shape) ** 0.5)).view_as(p))
        if self.workers.count > 1:
            flat = self.workers.sum_(torch.cat([u.flatten() for u in updates]))
            at = 0
            for u in updates:
                u.copy_(flat[at : at + u.numel()].view_as(u))
                at += u.numel()
        for p, u in zip(self.matrices, updates):
            p.mul_(1 - rate * self.weight_decay).add_(u, alpha=-rate)

    def state_dict(self) -> dict[str, object]:
        """Everything that a resumed run needs."""
        return {"rest": self.rest.state_dict(), "momentum": self.momentum}

    def load_state_dict(self, state: dict) -> None:
        """Take up a saved state."""
        self.rest.load_state_dict(state["rest"])
        for mine, saved in zip(self.momentum, state["momentum"]):
            mine.copy_(saved)
