"""The demo on a free port, with mini; every run of it can be slowed."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import idgen
from idgen.engine import Engine
from idgen.method import Order
from idgen.request import Request

PEOPLE = Path(__file__).parent.parent / "demo" / "people"


class Site:
    """A running demo and what its engine was asked."""

    def __init__(self) -> None:
        self.pause = 0.0
        """seconds added to each denoising step"""
        self.steps = 0
        """denoising steps done so far"""
        self.requests: list[Request] = []
        self.url = ""
        self.engine: Engine

    def load(self, name: str) -> Any:
        pipeline = idgen.load(name, base="mini", device="cpu", dtype="float32")
        render = pipeline.denoise

        def slowed(orders: list[Order], *, callback: Any = None, **options: Any) -> Any:
            self.requests += [order.request for order in orders]

            def after(step: Any) -> Any:
                self.steps += 1
                time.sleep(self.pause)
                return callback(step) if callback else None

            return render(orders, callback=after, **options)

        pipeline.denoise = slowed  # type: ignore[method-assign]
        return pipeline


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Serve the demo; its temporary files go to ``folder``."""
    from idgen.demo.app import build, look

    made, before = Site(), tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        with Engine(made.load, queue_size=8) as engine:
            made.engine = engine
            blocks = build(engine, base="mini")
            _, made.url, _ = blocks.launch(
                server_port=free_port(), prevent_thread_lock=True, quiet=True, ssr_mode=False, **look()
            )
            try:
                yield made
            finally:
                blocks.close(verbose=False)
    finally:
        tempfile.tempdir = before


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
