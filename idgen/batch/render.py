"""From units to portraits: models loaded once, people and prompts encoded once, as many images a UNet call as fit."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from idgen.batch import sources
from idgen.batch.plan import Unit
from idgen.batch.results import Outcome
from idgen.batching import DECIDED, GIVEN, OPTIONAL
from idgen.errors import IdgenError, OutOfMemory

if TYPE_CHECKING:
    from idgen.backbone import Backbone
    from idgen.method import Order
    from idgen.overlap import Denoised
    from idgen.pipeline import Pipeline

log = logging.getLogger("idgen")

PEOPLE = 256
"""Identities held at once, 0.2 MB each; of pipelines that look at whole photos a sixteenth as many."""


class Renderer:
    """Renders units, in one process, on one device."""

    def __init__(self, settings: dict[str, Any], batch_size: int | None = None) -> None:
        """settings: of `idgen.load`. batch_size: images in one UNet call at most; None finds out what fits."""
        from idgen.overlap import Finisher  # brings in torch, for which a dry run need not wait

        self.settings = settings
        self.batch_size = batch_size
        self._limit = batch_size
        self._pipeline: Pipeline | None = None
        self._base: Backbone | None = None
        """stays when its pipeline goes: the next one mostly takes it over"""
        self._failed: tuple[str, Exception] | None = None
        self._finisher = Finisher()
        self._people: OrderedDict[Any, dict[str, Any]] = OrderedDict()
        """what an order says of who is in it"""

    def render(self, units: Sequence[Unit], stopped: Callable[[], bool] = lambda: False) -> Iterator[Outcome]:
        """Yield an outcome for each unit, call by call; nothing that one unit does keeps the others from theirs.

        stopped: asked between UNet calls; once it says True, the rest stays undone.
        """
        ready: dict[Any, list[tuple[Unit, Order]]] = {}
        for unit in units:
            if stopped():
                return
            begun = time.perf_counter()
            try:
                order = self._order(unit)
                ready.setdefault(self._key(order), []).append((unit, order))
            except Exception as error:
                yield _failure(unit, error, time.perf_counter() - begun)
        yield from self._finished(self._denoised(list(ready.values()), stopped))

    def _denoised(
        self, groups: list[list[tuple[Unit, Order]]], stopped: Callable[[], bool]
    ) -> Iterator[Outcome | _Call]:
        for waiting in groups:
            while waiting and not stopped():
                size = self._size()
                yield from self._call(waiting[:size])
                waiting = waiting[size:]

    def _finished(self, calls: Iterator[Outcome | _Call]) -> Iterator[Outcome]:
        """Decode calls and measure their likeness, each beside the denoising of the next where the backbone gains by
        it (:attr:`idgen.backbone.Backbone.overlap`). The order stays."""
        beside: list[Outcome] = []
        for call in calls:
            done: list[Outcome] = []
            if isinstance(call, _Call) and call.pipeline.backbone.overlap:
                # Waits for the call before, whose outcomes are then complete.
                self._finisher.submit(partial(_deliver, call, done))
                yield from beside
                beside = done
                continue
            self._finisher.wait()
            yield from beside
            beside = []
            if isinstance(call, _Call):
                _deliver(call, done)
                yield from done
            else:
                yield call
        self._finisher.wait()
        yield from beside

    def _call(self, batch: list[tuple[Unit, Order]]) -> Iterator[Outcome | _Call]:
        """One UNet call; on trouble the batch is divided until the trouble is one unit's own."""
        begun = time.perf_counter()
        denoised: Denoised | None = None
        again = scarce = False
        try:
            pipeline = self._loaded(batch[0][0].pipeline)
            denoised = pipeline.denoise([order for _, order in batch])
        except Exception as error:
            scarce = isinstance(error, OutOfMemory | MemoryError)
            again = scarce and self._finisher.wait()  # beside a decoding it did not fit; alone it may
            if len(batch) == 1 and not again:
                yield _failure(batch[0][0], error, time.perf_counter() - begun)
                return
        # The other calls come after the except clause: inside it the error still holds the failed call's tensors.
        if denoised is not None:
            yield _Call([unit for unit, _ in batch], pipeline, denoised, time.perf_counter() - begun)
            return
        if again:
            yield from self._call(batch)
            return
        if scarce:
            self._limit = max(1, len(batch) // 2)
            log.warning("out of memory with %d images at once; going on with %d.", len(batch), self._limit)
        while batch:
            step = min(self._size(), len(batch)) if scarce else 1
            yield from self._call(batch[:step])
            batch = batch[step:]

    def _size(self) -> int:
        """Images in the next UNet call: as asked, or 8 (beyond which neither a CPU nor SDXL on a GPU gains much)."""
        return self._limit if self._limit is not None else AUTO

    def _order(self, unit: Unit) -> Order:
        """The unit's request with everything decided; a person's photos are looked at once."""
        from idgen.request import Request

        pipeline = self._loaded(unit.pipeline)
        key = sources.key(unit.fields.get("who"))
        known = self._people.get(key)
        fields = {name: sources.open_source(name, value) for name, value in unit.fields.items() if name != "who"}
        if known is None:
            request = Request.create(**fields, who=sources.open_source("who", unit.fields.get("who")))
            order = pipeline.order(request)
            names = ("identity", "embedding", "embeddings", "pictures")
            self._people[key] = {name: getattr(order, name) for name in names}
            while len(self._people) > (PEOPLE // 16 if order.pictures else PEOPLE):
                self._people.popitem(last=False)
            return order
        self._people.move_to_end(key)
        who = known["identity"] if known["identity"] is not None else list(known["pictures"]) or None
        return replace(pipeline.order(Request.create(**fields, who=who)), **known)

    def _key(self, order: Order) -> Any:
        """Orders of one key share a UNet call and come out of it as they would alone.

        The number of text tokens belongs to it: a short prompt beside a long one would be filled up with empty chunks,
        which the attention sees.
        """
        pipeline = self._pipeline
        assert pipeline is not None
        tokens = 0
        if not pipeline.methods[0].speaks_text:
            from idgen.text import encode_negative, encode_prompt

            backbone = pipeline.backbone
            tokens = encode_prompt(backbone, order.prompt).tokens.shape[1]
            if order.guided:
                tokens = max(tokens, encode_negative(backbone, order.negative_prompt).tokens.shape[1])
        return (
            *(getattr(order, name) for name in DECIDED),
            *(getattr(order.request, name) for name in GIVEN),
            *(getattr(order.request, name) is None for name in OPTIONAL),
            *(None if read is None else read.shape for read in (order.embedding, *order.embeddings.values())),
            tokens,
        )

    def _loaded(self, name: str) -> Pipeline:
        """The pipeline, resident until another one's turn comes; they share the backbone."""
        if self._pipeline is not None and self._pipeline.name == name:
            return self._pipeline
        if self._failed is not None and self._failed[0] == name:
            raise self._failed[1]
        from idgen.api import load

        self._pipeline, self._failed = None, None
        self._people.clear()  # their embeddings are those of the other pipeline's recogniser
        try:
            self._pipeline = load(name, **self.settings)
        except Exception as error:  # said again for each of its rows, without trying to load a thousand times
            self._failed = name, error
            raise
        self._base = self._pipeline.backbone
        return self._pipeline


AUTO = 8


@dataclass(frozen=True, eq=False)
class _Call:
    """A UNet call's latents, to be decoded."""

    units: list[Unit]
    pipeline: Pipeline
    denoised: Denoised
    seconds: float


def _deliver(call: _Call, outcomes: list[Outcome]) -> None:
    """Add an outcome for each unit of a call. Never raises: errors are outcomes too."""
    from idgen.overlap import portraits_of

    begun = time.perf_counter()
    made, count = portraits_of(call.pipeline, call.denoised, keep_inputs=True), len(call.units)
    seconds = (call.seconds + time.perf_counter() - begun) / count
    for unit, portraits in zip(call.units, made):
        if isinstance(portraits, Exception):
            outcomes.append(_failure(unit, portraits, seconds))
            continue
        (portrait,) = portraits
        outcomes.append(Outcome(unit, seconds, portrait, likeness=portrait.likeness, note=portrait.likeness_note))


def _failure(unit: Unit, error: Exception, seconds: float) -> Outcome:
    if isinstance(error, IdgenError):
        return Outcome(unit, seconds, error=str(error))
    log.warning("row %d failed unexpectedly", unit.row, exc_info=error)
    said = f"{type(error).__name__}: {error}. This is not the row's fault; run the same command again to retry it."
    return Outcome(unit, seconds, error=said, unexpected=True)
