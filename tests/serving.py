"""A real server on a real socket for tests, with tiny models and a tiny face pack."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from idgen.engine import Engine
from idgen.faces import FaceExtractor
from idgen.pipeline import Pipeline
from idgen.service.app import create_app
from idgen.service.settings import ServiceSettings
from idgen.service.state import Service
from tests import facepacks, tiny
from tests.engines import wait_until

FACEID, PLAIN = "ip-adapter-faceid-plusv2", "text-to-image"
SMALL = {"size": "64x64", "steps": 3}
"""for OpenAI's routes; ``tiny.SMALL`` for idgen's own"""


@dataclass
class Running:
    """A server that listens."""

    url: str
    service: Service
    server: uvicorn.Server
    thread: threading.Thread

    @property
    def engine(self) -> Engine:
        return self.service.engine

    def client(self, key: str | None = None, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **options)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def loader(folder: Path, gate: threading.Event | None = None) -> Callable[[str], Pipeline]:
    """Loads the tiny pipelines over one backbone; each call waits at the gate, if there is one."""
    extractor = FaceExtractor(facepacks.pack(folder))
    base = tiny.backbone()

    def load(name: str) -> Pipeline:
        if gate is not None:
            assert gate.wait(30)
        pipeline = tiny.load(FACEID if name == "auto" else name, base)
        pipeline.extractor = extractor
        return pipeline

    return load


@contextmanager
def running(
    folder: Path, gate: threading.Event | None = None, engine: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Running]:
    """Serve until the block ends."""
    given = {"pipelines": (FACEID, PLAIN), "demo": False, "identities_folder": folder / "identities", **settings}
    made = ServiceSettings(**given)
    owned = Engine(loader(folder / "pack", gate), **(engine or {}))
    app = create_app(made, owned)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=20, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        handle = Running(url, app.state.service, server, thread)
        if gate is None:
            wait_until(handle.service.ready.is_set, 60)
        yield handle
    finally:
        if gate is not None:
            gate.set()
        server.should_exit = True
        thread.join(30)
        owned.close(drain=False)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def photo(left: int = 60, who: str = "magenta", **others: Any) -> bytes:
    """A photo of somebody that the tiny detector finds."""
    return png(facepacks.photo((240, 240), **{who: (left, 60, left + 100, 180)}, **others))


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal but for the rounding of another batch size."""
    return one.shape == other.shape and bool(np.abs(one - other).max() <= 2)
