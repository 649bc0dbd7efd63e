"""Finishing pictures beside the next denoising: the UNet need not wait for the VAE, nor for the face recogniser.

One worker thread decodes the latents of one run and measures the likeness while the engine's thread already denoises
the next. At most one run is in its hands, so memory grows by one decoding and by no queue.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from idgen.memory import forgetting

if TYPE_CHECKING:
    from idgen.method import Order
    from idgen.pipeline import Pipeline
    from idgen.portrait import Portrait
    from idgen.speed import Levers


@dataclass(frozen=True, eq=False)
class Denoised:
    """What :meth:`~idgen.pipeline.Pipeline.denoise` made, for :meth:`~idgen.pipeline.Pipeline.finish`."""

    orders: list[Order]
    latents: Tensor
    """(B, c, h, w), the images of the first order first"""
    levers: Levers
    """those of the run, for the record"""
    ready: Any
    """the CUDA event after which the latents are computed; ``None`` elsewhere"""

    def parts(self) -> list[Denoised]:
        """Each order by itself."""
        rows = self.latents.split([len(order.seeds) for order in self.orders])
        return [Denoised([order], part, self.levers, self.ready) for order, part in zip(self.orders, rows)]


def portraits_of(pipeline: Pipeline, denoised: Denoised, keep_inputs: bool) -> list[list[Portrait] | Exception]:
    """Each order's portraits, or the error that it ended in.

    Args:
        keep_inputs: whether photos and identities are kept on this machine (see :mod:`idgen.memory`).
    """
    try:
        with nullcontext() if keep_inputs else forgetting():
            return [*pipeline.finish(denoised)]
    except Exception as error:
        if len(denoised.orders) == 1:
            return [error]
    # One of them cannot be finished, or together they are too large: each gets its own answer.
    return [portraits_of(pipeline, part, keep_inputs)[0] for part in denoised.parts()]


class Finisher:
    """A thread that does one piece of work after the other; whoever brings the next waits until the last is done."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "idgen-finish")
        # Started now: later it might not start, and what was brought would be neither done nor refused.
        self._thread = self._pool.submit(threading.current_thread).result()
        self._work: Future[None] | None = None

    @property
    def is_here(self) -> bool:
        """Whether the caller runs on this thread, and so must not wait for it."""
        return threading.current_thread() is self._thread

    def submit(self, work: Callable[[], None]) -> None:
        """Start ``work``, which handles its own errors, once what was brought before is done."""
        self.wait()
        try:
            self._work = self._pool.submit(work)
        except RuntimeError:  # the program is ending: pools take no more, yet its other threads want their results
            work()

    def wait(self) -> bool:
        """Wait until nothing is in work. Returns whether there was something."""
        busy = self._work is not None and not self._work.done()
        if self._work is not None:
            self._work.result()
        self._work = None
        return busy

    def close(self) -> None:
        """Finish what is in work and end the thread."""
        self._pool.shutdown()
