"""The service's own API over real sockets: portraits, events, people, operations, and who leaves or comes too late."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from idgen.engine import Engine
from idgen.faces import FaceExtractor
from idgen.service.app import create_app
from idgen.service.settings import ServiceSettings
from tests import facepacks, tiny
from tests.serving import FACEID, PLAIN, Running, photo, picture, png, running, same, wait_until

ORDER = {"prompt": "an astronaut", "pipeline": PLAIN, "seed": 5, **tiny.SMALL}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("service")) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def events_of(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in response.read().decode().strip().split("\n\n"):
        if not block.startswith(":"):
            event, data = block.split("\n")
            found.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_portrait_of_a_photo_comes_with_seed_likeness_and_provenance(client: httpx.Client) -> None:
    answer = client.post("/v1/portraits", json={**ORDER, "pipeline": FACEID, "photos": [b64(photo())], "n": 2}).json()
    assert answer["pipeline"] == FACEID and answer["seconds"] > 0
    first, second = answer["portraits"]
    assert (first["seed"], second["seed"]) == (5, 6)
    assert picture(base64.b64decode(first["image"])).shape == (64, 64, 3)
    assert first["likeness"] is not None or first["likeness_note"]
    assert first["provenance"]["request"]["steps"] == 3


def test_a_png_carries_how_it_was_made(client: httpx.Client, tmp_path: Path) -> None:
    from idgen.portrait import read_metadata

    answer = client.post("/v1/portraits", json=ORDER).json()
    file = tmp_path / "portrait.png"
    file.write_bytes(base64.b64decode(answer["portraits"][0]["image"]))
    assert read_metadata(file)["seed"] == 5


def test_events_tell_queue_progress_previews_and_the_portraits(client: httpx.Client) -> None:
    order = {**ORDER, "steps": 4, "n": 2, "stream": True, "previews": 2}
    response = client.post("/v1/portraits", json=order)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response)
    names = [name for name, _ in events]
    assert names[0] == "queued" and names[-3:] == ["portrait", "portrait", "done"]
    progress = [data for name, data in events if name == "progress"]
    assert progress[-1]["step"] == progress[-1]["total"] == 4 and progress[-1]["eta_s"] == 0
    shown = [data["previews"] for data in progress if "previews" in data]
    assert shown and all(len(previews) == 2 for previews in shown)
    assert picture(base64.b64decode(shown[-1][0])).shape == (64, 64, 3)
    whole = client.post("/v1/portraits", json={**ORDER, "steps": 4, "n": 2}).json()["portraits"]
    streamed = [data for name, data in events if name == "portrait"]
    for one, other in zip(streamed, whole):
        assert same(picture(base64.b64decode(one["image"])), picture(base64.b64decode(other["image"])))


def test_the_accept_header_asks_for_previews_too(client: httpx.Client) -> None:
    with client.stream(
        "POST", "/v1/portraits", json={**ORDER, "previews": 1}, headers={"accept": "text/event-stream"}
    ) as answer:
        assert [data for event, data in events_of(answer) if event == "progress" and data.get("previews")]


def test_the_accept_header_asks_for_events_too(client: httpx.Client) -> None:
    response = client.post("/v1/portraits", json=ORDER, headers={"accept": "text/event-stream"})
    assert [name for name, _ in events_of(response)][-1] == "done"


def test_faces_are_found_and_numbered(client: httpx.Client) -> None:
    picture = photo(10, cyan=(120, 60, 230, 200))
    found = client.post("/v1/faces", files={"photo": picture}).json()
    assert (found["width"], found["height"]) == (240, 240)
    assert [face["index"] for face in found["faces"]] == [0, 1]
    assert found["faces"][0]["box"] == pytest.approx([120, 60, 230, 200], abs=3)
    assert len(found["faces"][0]["keypoints"]) == 5


def test_an_identity_is_enrolled_listed_used_and_forgotten(client: httpx.Client) -> None:
    files = [("photo", photo()), ("photo", photo(70))]
    made = client.post("/v1/identities", files=files, data={"name": "Ada"})
    assert made.status_code == 201
    identity = made.json()["id"]
    assert made.json()["recognisers"] == ["rec"]
    assert identity in [item["id"] for item in client.get("/v1/identities").json()["data"]]
    assert client.get(f"/v1/identities/{identity}").json()["name"] == "Ada"
    portrait = client.post("/v1/portraits", json={**ORDER, "pipeline": "auto", "identity": identity})
    assert portrait.json()["pipeline"] == FACEID
    assert client.delete(f"/v1/identities/{identity}").json()["deleted"] is True
    gone = client.post("/v1/portraits", json={**ORDER, "identity": identity})
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "identity")
    assert client.delete(f"/v1/identities/{identity}").status_code == 404


def test_a_person_is_enrolled_for_the_recognisers_of_all_pipelines(tmp_path: Path) -> None:
    with running(tmp_path) as server, server.client() as client:
        pack = facepacks.pack(tmp_path / "other")
        other = facepacks.recogniser(tmp_path / "other-recogniser.onnx", seed=1)
        server.engine.pipeline(PLAIN).extractor = FaceExtractor(pack, other)
        made = client.post("/v1/identities", files={"photo": photo()}).json()
    assert made["recognisers"] == ["rec", "other-recogniser"]


def test_health_readiness_and_metrics_tell_the_truth(client: httpx.Client, server: Running) -> None:
    client.post("/v1/portraits", json=ORDER)
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["ready"] is True
    text = client.get("/metrics").text
    served = server.engine.stats().served
    assert f'idgen_jobs_total{{state="served"}} {served:.1f}' in text
    assert 'idgen_http_requests_total{method="POST",route="/v1/portraits",status="200"}' in text
    assert f"idgen_batch_images_count {sum(server.engine.stats().batch_sizes.values()):.1f}" in text
    assert "idgen_queue_length 0.0" in text


def test_a_panic_while_the_models_load_is_said_and_not_waited_for_forever(tmp_path: Path) -> None:
    class Panic(BaseException): ...

    def load(name: str) -> Any:
        raise Panic("no unwrap today")

    engine = Engine(load)
    app = create_app(ServiceSettings(pipelines=(PLAIN,), demo=False, identities_folder=tmp_path), engine)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        wait_until(lambda: "could not be loaded" in client.get("/readyz").json()["reason"])


def test_a_full_queue_answers_429_with_retry_after_and_readyz_says_so(tmp_path: Path) -> None:
    gate = threading.Event()
    with running(tmp_path, gate, engine={"queue_size": 2}, preload=False) as server, server.client() as client:
        first = [threading.Thread(target=lambda: answers.append(send(server)), daemon=True) for _ in range(3)]
        answers: list[httpx.Response] = []
        first[0].start()
        wait_until(lambda: server.engine.stats().running == 1)
        for thread in first[1:]:
            thread.start()
        wait_until(lambda: server.engine.stats().queued == 2)
        refused = client.post("/v1/portraits", json=ORDER)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert client.get("/readyz").status_code == 503
        gate.set()
        for thread in first:
            thread.join(60)
        assert [answer.status_code for answer in answers] == [200] * 3


def send(server: Running, **fields: Any) -> httpx.Response:
    with server.client() as client:
        return client.post("/v1/portraits", json={**ORDER, **fields})


def leave(server: Running, **fields: Any) -> None:
    """Send an order, and close the connection as soon as the engine has it."""
    address, body, before = httpx.URL(server.url), json.dumps({**ORDER, **fields}), in_hand(server)
    head = f"POST /v1/portraits HTTP/1.1\r\nhost: {address.host}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((address.host, address.port or 0), timeout=20) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        wait_until(lambda: in_hand(server) > before)


def in_hand(server: Running) -> int:
    """Jobs that wait or run."""
    stats = server.engine.stats()
    return stats.queued + stats.running


def test_a_client_that_leaves_frees_its_place_in_the_queue(tmp_path: Path) -> None:
    gate = threading.Event()
    with running(tmp_path, gate, preload=False) as server:
        server.engine.submit(server.service.order({"pipeline": PLAIN, **tiny.SMALL}))
        wait_until(lambda: server.engine.stats().running == 1)
        leave(server)
        wait_until(lambda: server.engine.stats().cancelled == 1)
        assert server.engine.stats().queued == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_work_that_runs_for_it(server: Running, stream: bool) -> None:
    before = server.engine.stats()
    if stream:
        with (
            server.client() as client,
            client.stream("POST", "/v1/portraits", json={**ORDER, "steps": 150, "stream": True, "n": 8}) as events,
        ):
            next(events.iter_raw())
    else:
        leave(server, steps=150, n=8)
    wait_until(lambda: server.engine.stats().cancelled == before.cancelled + 1)
    wait_until(lambda: server.engine.stats().running == 0)
    assert send(server).status_code == 200
    assert server.engine.stats().images == before.images + 1


def test_a_deadline_ends_a_request_with_408(client: httpx.Client) -> None:
    answer = client.post("/v1/portraits", json={**ORDER, "steps": 150, "n": 8, "deadline": 0.2})
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "deadline_exceeded")


def test_a_graceful_stop_finishes_what_runs_and_what_waits(tmp_path: Path) -> None:
    gate = threading.Event()

    def refuses() -> bool:
        try:
            socket.create_connection((address.host, address.port or 0), timeout=20).close()
        except ConnectionRefusedError:
            return True
        return False

    with running(tmp_path, gate, engine={"batching": False}, preload=False) as server:
        address, answers = httpx.URL(server.url), list[httpx.Response]()
        threads = [threading.Thread(target=lambda: answers.append(send(server)), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.engine.stats().running == 1 and server.engine.stats().queued == 2)
        server.server.should_exit = True
        wait_until(refuses)
        gate.set()  # all three are finished after the server has begun to stop
        for thread in threads:
            thread.join(60)
        assert [answer.status_code for answer in answers] == [200] * 3
        server.thread.join(30)
        assert not server.thread.is_alive()


def test_fifty_clients_get_their_own_pictures_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = range(8)
    small = {"width": 32, "height": 32, "steps": 2}
    with running(tmp_path, engine={"queue_size": 20}) as server:
        expected = {s: send(server, seed=s, **small).json()["portraits"][0]["image"] for s in seeds}
        own = {s: picture(base64.b64decode(image)) for s, image in expected.items()}
        crossed, refused, lock = [], [0], threading.Lock()
        pipeline = server.engine.pipeline(PLAIN)
        whole = pipeline.denoise

        def denoise(*args: Any, **options: Any) -> Any:
            wait_until(lambda: server.engine.stats().rejected > 0, 120)  # until the queue has been full
            return whole(*args, **options)

        monkeypatch.setattr(pipeline, "denoise", denoise)

        def visitor(number: int) -> None:
            with server.client() as client:
                for turn in range(2):
                    seed = (number + turn) % len(seeds)
                    while (answer := client.post("/v1/portraits", json={**ORDER, **small, "seed": seed})).is_error:
                        assert answer.status_code == 429
                        with lock:
                            refused[0] += 1
                        time.sleep(0.05)
                    datum = answer.json()["portraits"][0]
                    if datum["seed"] != seed or not same(picture(base64.b64decode(datum["image"])), own[seed]):
                        crossed.append((number, seed))

        threads = [threading.Thread(target=visitor, args=(number,), daemon=True) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
        stats = server.engine.stats()
        assert crossed == []
        assert stats.served == 100 + len(seeds)
        assert stats.rejected == refused[0] > 0  # 50 clients at a queue of 20
        assert max(stats.batch_sizes) == 8
        assert stats.queued == stats.running == 0


def test_photo_and_identity_together_are_refused(client: httpx.Client) -> None:
    order = {**ORDER, "identity": "idn_" + "0" * 24, "photos": [b64(photo())]}
    assert client.post("/v1/portraits", json=order).status_code == 400


def test_image_to_image_starts_from_the_picture(client: httpx.Client) -> None:
    from PIL import Image

    white = b64(png(Image.new("RGB", (64, 64), "white")))
    answer = client.post("/v1/portraits", json={**ORDER, "image": white, "strength": 0.4})
    assert answer.status_code == 200
    plain = client.post("/v1/portraits", json=ORDER).json()["portraits"][0]["image"]
    assert not same(picture(base64.b64decode(answer.json()["portraits"][0]["image"])), picture(base64.b64decode(plain)))


def test_what_would_be_ignored_is_refused(client: httpx.Client) -> None:
    files = {"image": ("a.png", photo())}
    identity = client.post("/v1/identities", files={"photo": photo()}).json()["id"]
    for form, field in (({"mask": "text"}, "mask"), ({"identity": identity}, "identity")):
        answer = client.post("/v1/images/edits", data={"prompt": "x", "model": FACEID, **form}, files=files)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field
    two = [("photo", photo()), ("photo", photo())]
    answer = client.post("/v1/identities", files=two, data={"face": "0"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "face"


def test_one_damaged_identity_does_not_hide_the_others(tmp_path: Path) -> None:
    with running(tmp_path) as server, server.client() as client:
        first, second = (client.post("/v1/identities", files={"photo": photo()}).json()["id"] for _ in range(2))
        (tmp_path / "identities" / "everybody" / f"{first}.safetensors").write_bytes(b"damaged")
        listed = client.get("/v1/identities")
        assert listed.status_code == 200
        assert [each["id"] for each in listed.json()["data"]] == [second]


def test_a_combination_is_served_where_it_is_named_and_never_twice_the_same_part(tmp_path: Path) -> None:
    both = f"{FACEID}+instantid"
    with running(tmp_path, pipelines=(both,), preload=False) as server, server.client() as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [both]
        assert client.get(f"/v1/models/{both}").status_code == 200
        assert client.get("/v1/models/instantid").status_code == 404
    with running(tmp_path) as server, server.client() as client:
        assert client.get(f"/v1/models/{FACEID}+{PLAIN}").status_code == 200
        assert client.get(f"/v1/models/{FACEID}+{FACEID}").status_code == 404
