"""``idgen serve`` as a process: from the command to a page, and what a signal does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import tiny
from tests.serving import wait_until

posix = pytest.mark.skipif(os.name != "posix", reason="this system has no such signal: run it on Linux or macOS")


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["serve", "--port", str(port), "--base", str(tiny.SDXL), "--pipeline", "text-to-image"]
    command += ["--device", "cpu", "--dtype", "float32"]
    # A file, not a pipe: a pipe that nobody empties holds the server up once it is full.
    with (tmp_path / "log.txt").open("w") as log:
        started = subprocess.Popen(
            [sys.executable, "-c", "from idgen.cli import main; main()", *command],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:

        def ready() -> bool:
            try:
                return client.get("/readyz").status_code == 200
            except httpx.ConnectError:
                assert started.poll() is None, (tmp_path / "log.txt").read_text()
                time.sleep(0.1)  # it needs the processor to start
                return False

        try:
            wait_until(ready, 120)
            yield started, client
        finally:
            started.kill()
            started.wait()


@posix
def test_a_signal_finishes_what_runs_and_does_not_wait_for_open_pages(
    process: tuple[subprocess.Popen[bytes], httpx.Client],
) -> None:
    server, client = process
    answers: list[int] = []
    order = {"prompt": "x", "pipeline": "text-to-image", "width": 64, "height": 64, "steps": 100, "n": 2}
    visitor = threading.Thread(
        target=lambda: answers.append(client.post("/v1/portraits", json=order).status_code), daemon=True
    )
    with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False) as page:
        assert "gradio" in page.get("/").text
        with page.stream("GET", "/gradio_api/heartbeat/a-page") as heartbeat:
            assert heartbeat.status_code == 200
            visitor.start()
            wait_until(lambda: "idgen_running 1.0" in page.get("/metrics").text)
            server.send_signal(signal.SIGTERM)
            visitor.join(60)
            assert answers == [200]
            server.wait(30)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{client.base_url}/healthz", trust_env=False)
