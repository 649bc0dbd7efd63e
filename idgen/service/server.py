"""uvicorn, with an end that waits for answers but not for open pages."""

from __future__ import annotations

import threading
import time
from types import FrameType
from typing import Any

import uvicorn

from idgen.service.state import Service


class Server(uvicorn.Server):
    """On the first signal: finish what runs and waits, then close what is still open, such as the demo's pages.

    uvicorn alone would wait for these too, and a page in a browser never closes its event stream by itself.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            threading.Thread(target=self._let_go, name="idgen-exit", daemon=True).start()
        super().handle_exit(sig, frame)

    def _let_go(self) -> None:
        end = time.monotonic() + self.service.settings.grace_s
        while time.monotonic() < end and self._busy():
            time.sleep(0.1)
        time.sleep(0.5)  # for the demo to show what was finished last
        self.force_exit = True

    def _busy(self) -> bool:
        stats = self.service.engine.stats()
        return bool(stats.queued or stats.running or self.service.open_requests)


def run(app: Any, **options: Any) -> None:
    """Serve an application of :func:`idgen.service.app.create_app` until a signal. ``options`` go to uvicorn."""
    service: Service = app.state.service
    settings = service.settings
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=int(settings.grace_s),
        server_header=False,
        **options,
    )
    try:
        Server(config, service).run()
    finally:
        service.engine.close(drain=False)
