"""The service on a real local Ray cluster: two replicas, one answer."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from idgen.errors import BadRequest
from idgen.service.settings import ServiceSettings
from tests import tiny
from tests.serving import PLAIN, picture, same, wait_until

ray = pytest.importorskip(
    "ray", reason="Ray is not installed: pip install 'idgen[cluster]', on a Python that Ray has a wheel for"
)
KEY = "a-key-of-the-cluster"
ORDER = {"prompt": "x", "pipeline": PLAIN, **tiny.SMALL}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from idgen import serve_cluster

    patch = pytest.MonkeyPatch()
    # On a busy machine its proxy takes longer to start than Serve waits (5 s), which then kills it.
    patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
    patch.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "120")
    ray.init(
        num_cpus=2,
        num_gpus=0,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ServiceSettings(
        port=port,
        base=str(tiny.SDXL),
        device="cpu",
        dtype="float32",
        pipelines=(PLAIN,),
        api_keys=(KEY,),  # type: ignore[arg-type]
        identities_folder=tmp_path_factory.mktemp("identities"),
    )
    yield serve_cluster.start(settings, replicas=2, cpus=0.5)
    from ray import serve

    serve.shutdown()
    ray.shutdown()
    patch.undo()


def client(url: str, key: str = KEY) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=120, trust_env=False)


def test_two_replicas_share_the_work_and_agree(url: str) -> None:
    answers: dict[int, Any] = {}

    def visitor(number: int) -> None:
        with client(url) as http:
            answers[number] = http.post("/v1/portraits", json={**ORDER, "seed": number % 2})

    threads = [threading.Thread(target=visitor, args=(number,), daemon=True) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
    assert [answers[k].status_code for k in range(16)] == [200] * 16
    images = {k: picture(base64.b64decode(answers[k].json()["portraits"][0]["image"])) for k in answers}
    for number, image in images.items():
        assert same(image, images[number % 2])
    assert not same(images[0], images[1])
    served = {}
    for _ in range(40):
        with client(url) as http:
            numbers = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#")
        # Two replicas may have served the same number, but never in the same time to the nanosecond.
        served[numbers["idgen_busy_seconds_total"]] = float(numbers['idgen_jobs_total{state="served"}'])
    assert len(served) == 2 and sum(served.values()) == 16  # each replica tells of its own


def test_events_errors_and_keys_pass_through_the_cluster(url: str) -> None:
    with client(url) as http:
        events = http.post("/v1/portraits", json={**ORDER, "stream": True}).text
        assert events.startswith("event: queued") and "event: done" in events
        assert http.post("/v1/portraits", json={**ORDER, "steps": 0}).json()["error"]["param"] == "steps"
        urls = http.post("/v1/images/generations", json={"prompt": "x", "response_format": "url"})
        assert urls.json()["error"]["param"] == "response_format"
    with client(url, "wrong-key") as stranger:
        assert stranger.get("/v1/models").status_code == 401


def test_arguments_of_serve_run_become_settings(tmp_path: Path) -> None:
    from idgen import serve_cluster

    config = tmp_path / "serve.toml"
    config.write_text('base = "mini"\n')
    serve_cluster.app({"replicas": "2", "gpus": "0.5", "config": str(config), "queue_size": "3"})
    with pytest.raises(BadRequest, match="queue_size"):
        serve_cluster.app({"queue_size": "0"})
    with pytest.raises(BadRequest, match="replicas"):
        serve_cluster.app({"replicas": "0"})


def test_a_client_that_leaves_the_cluster_frees_its_place(url: str) -> None:
    def metrics(_: int) -> str:
        with client(url) as http:
            return http.get("/metrics").text

    def told(line: str) -> bool:
        """Whether a replica says so. Many are asked at once: one by one all would go to the replica that is idle."""
        with ThreadPoolExecutor(8) as pool:
            return any(line in text for text in pool.map(metrics, range(8)))

    large = {"steps": 150, "n": 8, "width": 256, "height": 256}
    address, body = httpx.URL(url), json.dumps({**ORDER, **large})
    head = f"POST /v1/portraits HTTP/1.1\r\nhost: {address.host}\r\nauthorization: Bearer {KEY}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection((address.host, address.port or 0), timeout=60) as connection:
        connection.sendall((head + body).encode())
        wait_until(lambda: told("idgen_running 1.0"))
    wait_until(lambda: told('idgen_jobs_total{state="cancelled"} 1.0'))
