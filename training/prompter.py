"""Random captions for rows of the training set, and their text features."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from .captions import blank_caption, random_caption
from .text import TextEncoders

VARIANTS = 2
"""Captions per picture in a prepared pool."""


class Prompter:
    """Random captions to frozen text features.

    On a CPU every caption is made when it is needed. A GPU asks for thousands a second, more than Python can write, so
    there the captions of the whole training set are written once, in several variants.
    """

    def __init__(self, text: TextEncoders, device: torch.device | str, seed: int = 0) -> None:
        self.text, self.device, self.rng = text.eval().requires_grad_(False), device, random.Random(seed)
        self._pool: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context [n, L, C] and pooled vector [n, P] of prompts."""
        return self.text(self.text.ids(list(prompts)).to(self.device))

    @torch.no_grad()
    def speak(self, labels: dict[str, Tensor], rows: Tensor, blank: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Context, pooled vector and what is said (as :meth:`ids`) for random captions of ``rows``."""
        ids, said = self.ids(labels, rows, blank)
        return *self.text(ids), said

    def ids(self, labels: dict[str, Tensor], rows: Tensor, blank: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Token ids [n, L] of random captions for ``rows`` of the set that ``labels`` describes.

        An empty caption where ``blank`` [n]. Also, per attribute, 1 in the rows where it is said [n].
        """
        if torch.device(self.device).type == "cpu":
            prompts, said = self._write(labels, rows, blank)
            return self.text.ids(prompts), {k: said[:, i] for i, k in enumerate(labels)}
        if self._pool is None:
            self._pool = self._prepare(labels)
        pool, known, blanks = self._pool
        variant = torch.randint(0, len(pool), (len(rows),))
        nothing = blanks[torch.randint(0, len(blanks), (len(rows),))]
        ids = torch.where(blank[:, None], nothing, pool[variant, rows])
        said = known[variant, rows].float() * (~blank)[:, None]
        return ids.to(self.device), {k: said[:, i].to(self.device) for i, k in enumerate(labels)}

    def _write(self, labels: dict[str, Tensor], rows: Tensor, blank: Tensor) -> tuple[list[str], Tensor]:
        """Captions, and what they say [n, attributes]."""
        mine = {k: v[rows] for k, v in labels.items()}
        plain = {k: v.tolist() for k, v in mine.items()}
        prompts, said = [], []
        for i, empty in enumerate(blank.tolist()):
            prompt, meaning = random_caption(mine, i, self.rng)
            prompts.append(blank_caption(self.rng) if empty else prompt)
            said.append([float(not empty and meaning[k] == plain[k][i]) for k in labels])
        return prompts, torch.tensor(said)

    def _prepare(self, labels: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [variants, n, L], what is said [variants, n, attributes] and ids of empty captions [64, L]."""
        n = len(next(iter(labels.values())))
        ids, known = [], []
        for _ in range(VARIANTS):
            prompts, said = self._write(labels, torch.arange(n), torch.zeros(n, dtype=torch.bool))
            ids.append(self.text.ids(prompts))
            known.append(said.bool())
        blanks = self.text.ids([blank_caption(self.rng) for _ in range(64)])
        return torch.stack(ids), torch.stack(known), blanks
