"""Pipelines by name, of which only so many stay in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from idgen.pipeline import Pipeline

SPARE = 4
"""Pipelines that stay beside those that were asked for in advance. Their methods' own weights are what they cost, up to
4 GiB for InstantID on SDXL: the base model is shared."""


class Residents:
    """Loads pipelines when they are first asked for and forgets those that were not used for longest."""

    def __init__(self, load: Callable[[str], Pipeline], keep: Sequence[str] = (), spare: int = SPARE) -> None:
        """
        Args:
            load: gives a pipeline for a name.
            keep: names of pipelines that are never forgotten once they are loaded.
            spare: how many others may be there, at least 1.
        """
        self._load = load
        self._keep = frozenset(keep)
        self._spare = spare
        self._by_name: OrderedDict[str, Pipeline] = OrderedDict()
        """by the pipeline's own name, the least recently used first"""
        self._own_names: dict[str, str] = {}
        """name asked for, such as ``auto`` -> the pipeline's own name"""
        self._loading = threading.Lock()

    def get(self, name: str) -> Pipeline:
        """The pipeline of that name, loaded where it is not there. Raises whatever ``load`` raises."""
        with self._loading:
            pipeline = self.known(name)
            if pipeline is None:
                # Before, not after: memory has to hold the old ones and the new one at no time.
                self._forget(all_but=self._spare - (name not in self._keep))
                pipeline = self._load(name)
                # "auto" and the name it stands for share one pipeline, so that their requests share UNet calls.
                self._own_names[name] = pipeline.name
                pipeline = self._by_name.setdefault(pipeline.name, pipeline)
            self._by_name.move_to_end(pipeline.name)
            return pipeline

    def known(self, name: str) -> Pipeline | None:
        """The pipeline of that name if it is there. Waits for no loading."""
        return self._by_name.get(self._own_names.get(name, name))

    def all(self) -> list[Pipeline]:
        """Those that are there."""
        return list(self._by_name.copy().values())

    def _forget(self, all_but: int) -> None:
        kept = {self._own_names.get(name, name) for name in self._keep}
        others = [name for name in self._by_name if name not in kept]
        for name in others[: max(0, len(others) - all_but)]:
            del self._by_name[name]
            self._own_names = {given: own for given, own in self._own_names.items() if own != name}
