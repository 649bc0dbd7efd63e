"""What the service refuses, over real sockets, and that it lives on afterwards."""

from __future__ import annotations

import base64
import contextlib
import http.server
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, ImageFile

from idgen.service.limits import Keys, RateLimit
from tests import tiny
from tests.serving import FACEID, PLAIN, Running, photo, png, running, wait_until

KEYS = ("first-key-of-tests", "second-key-of-tests")
ORDER = {"prompt": "x", "pipeline": PLAIN, "seed": 5, **tiny.SMALL}
LIMITS: dict[str, Any] = {"max_upload_bytes": 300_000, "max_pixels": 1_000_000, "upload_timeout_s": 1.0, "max_n": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("limits"), api_keys=KEYS, **LIMITS) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client(KEYS[0]) as client:
        yield client
        assert client.get("/healthz").status_code == 200
        assert client.post("/v1/portraits", json=ORDER).status_code == 200


def refused(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text


@pytest.mark.parametrize("header", [None, "Bearer wrong-key", "Bearer", "Basic Zmlyc3Q=", f"bearer {KEYS[0]}x"])
def test_without_a_valid_key_nothing_is_done(server: Running, header: str | None) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as stranger:
        headers = {"authorization": header} if header else {}
        for method, path in (("POST", "/v1/portraits"), ("GET", "/v1/models"), ("GET", "/metrics")):
            refused(stranger.request(method, path, headers=headers, json={}), 401, "invalid_api_key")
        assert stranger.get("/healthz").status_code == stranger.get("/readyz").status_code == 200


def test_a_strangers_upload_is_not_even_read(server: Running) -> None:
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 0), timeout=20) as connection:
        head = f"POST /v1/faces HTTP/1.1\r\nhost: {address.host}\r\ncontent-length: 200000\r\n"
        connection.sendall((head + "authorization: Bearer wrong-key\r\n\r\n").encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")


def test_every_key_works_and_sees_its_own_identities_only(server: Running) -> None:
    with server.client(KEYS[0]) as one, server.client(KEYS[1]) as other:
        identity = one.post("/v1/identities", files={"photo": photo()}).json()["id"]
        assert one.get(f"/v1/identities/{identity}").status_code == 200
        assert other.get("/v1/identities").json()["data"] == []
        assert other.get(f"/v1/identities/{identity}").status_code == 404
        assert other.delete(f"/v1/identities/{identity}").status_code == 404
        refused(other.post("/v1/portraits", json={**ORDER, "identity": identity}), 404, "not_found")


def test_keys_are_compared_by_digest_and_all_of_them() -> None:
    keys = Keys(KEYS)
    owners = [keys.owner(key) for key in KEYS]
    assert None not in owners and owners[0] != owners[1]
    assert not any(key in str(vars(keys)) or key in str(owners) for key in KEYS)
    assert keys.owner("") is keys.owner(KEYS[0][:-1]) is keys.owner("\ud800") is None
    assert not Keys([])


def test_a_rate_is_held_for_each_client_and_refills() -> None:
    limit = RateLimit(per_minute=2)
    assert [limit.take("a", now=0), limit.take("a", now=0)] == [0, 0]
    assert limit.take("a", now=0) == pytest.approx(30)
    assert limit.take("b", now=0) == 0
    assert limit.take("a", now=30.1) == 0
    assert limit.take("a", now=30.2) > 0
    assert all(RateLimit(0).take("a") == 0 for _ in range(100))


def test_above_the_rate_the_answer_is_429_with_retry_after(tmp_path: Path) -> None:
    limited = running(tmp_path, api_keys=KEYS, rate_limit=2)
    with limited as server, server.client(KEYS[0]) as one, server.client(KEYS[1]) as other:
        assert [one.get("/v1/models").status_code for _ in range(2)] == [200, 200]
        late = one.get("/v1/models")
        refused(late, 429, "rate_limit_exceeded")
        assert 1 <= int(late.headers["retry-after"]) <= 30
        assert other.get("/v1/models").status_code == 200


def test_too_many_bytes_are_refused_announced_or_not(client: httpx.Client) -> None:
    huge = b"x" * 400_000
    refused(client.post("/v1/faces", files={"photo": huge}), 413, "too_large")

    def unannounced() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 10_000

    with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        refused(client.post("/v1/portraits", content=unannounced()), 413, "too_large")


def test_too_many_pixels_are_refused_before_they_are_decoded(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = png(Image.new("L", (8000, 8000)))
    assert len(bomb) < 300_000
    with monkeypatch.context() as patch:
        decoded: list[Any] = []
        patch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image))
        refused(client.post("/v1/faces", files={"photo": bomb}), 400, "bad_image")
    assert not decoded


def test_too_many_photos_images_steps_and_pixels_are_refused(client: httpx.Client) -> None:
    files = [("image", (f"{k}.png", b"x", "image/png")) for k in range(17)]
    refused(client.post("/v1/images/edits", files=files, data={"prompt": "x"}), 400, "too_many_photos")
    for wrong in ({"n": 3}, {"steps": 151}, {"width": 2056}, {"width": 12}, {"width": 65}, {"steps": 0}, {"seed": -1}):
        answer = client.post("/v1/portraits", json={**ORDER, **wrong})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(wrong)), wrong


def test_a_slow_upload_is_cut_off(server: Running, client: httpx.Client) -> None:
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 0), timeout=20) as connection:
        head = f"POST /v1/portraits HTTP/1.1\r\nhost: {address.host}\r\nauthorization: Bearer {KEYS[0]}\r\n"
        connection.sendall((head + "content-type: application/json\r\ncontent-length: 1000\r\n\r\n{").encode())
        started, answer = time.monotonic(), b""
        while block := connection.recv(65536):  # the head and the body may come one after the other
            answer += block
        assert answer.startswith(b"HTTP/1.1 408") and b"upload_timeout" in answer
        assert 0.9 < time.monotonic() - started < 15


HOSTILE = {
    "empty": b"",
    "text": b"hello",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "html": b"<!doctype html><script>alert(1)</script>",
    "postscript": b"%!PS\n(/etc/passwd) (r) file",
    "cut short": photo()[:200],
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "a png whose data is a bomb": b"\x89PNG\r\n\x1a\n" + zlib.compress(b"\0" * 10_000_000),
    "pickle": b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_photo_is_refused_everywhere(client: httpx.Client, name: str) -> None:
    data = HOSTILE[name]
    for path, field, more in (
        ("/v1/faces", "photo", {}),
        ("/v1/identities", "photo", {}),
        ("/v1/images/edits", "image", {"prompt": "x"}),
    ):
        answer = client.post(path, files={field: ("a.png", data, "image/png")}, data=more)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field, (path, answer.text)
    order = {**ORDER, "pipeline": FACEID, "photos": [base64.b64encode(data).decode()]}
    assert client.post("/v1/portraits", json=order).status_code == 400


@pytest.mark.parametrize(
    "text", ["/etc/passwd", "C:\\photo.png", "file:///etc/passwd", "../a.png", "data:image/png,x", "\x00"]
)
def test_a_photo_is_never_read_from_the_servers_disk(client: httpx.Client, text: str, tmp_path: Path) -> None:
    for field in ("photos", "pose", "image", "mask"):
        value = [text] if field == "photos" else text
        answer = client.post("/v1/portraits", json={**ORDER, "pipeline": FACEID, field: value})
        assert answer.status_code == 400 and "passwd" not in answer.text


@pytest.mark.parametrize("name", ["../../x", "idn_", "idn_" + "g" * 24, "%2e%2e%2fx", "idn_000000000000000000000000"])
def test_an_identitys_id_is_never_a_path(client: httpx.Client, name: str) -> None:
    assert client.get(f"/v1/identities/{name}").status_code == 404
    assert client.post("/v1/portraits", json={**ORDER, "identity": name}).status_code == 404


BODIES = [
    (b"", "application/json"),
    (b"{", "application/json"),
    (b"[" * 50_000 + b"]" * 50_000, "application/json"),
    (b'{"prompt": 1e999, "steps": NaN}', "application/json"),
    (b'{"prompt": "\\ud800"}', "application/json"),
    (b"\xff\xfe", "application/json"),
    (b"prompt=x", "application/x-www-form-urlencoded"),
    (b"--x\r\n\r\n", "multipart/form-data"),
    (b"--x\r\ncontent-disposition: form-data\r\n\r\nx\r\n--x--", "multipart/form-data; boundary=x"),
    (b"--x\r\n" + b"a" * 100_000, "multipart/form-data; boundary=x"),
    (b"x", "text/plain"),
]


@pytest.mark.parametrize(
    "path", ["/v1/portraits", "/v1/images/edits", "/v1/images/generations", "/v1/faces", "/v1/identities"]
)
def test_malformed_bodies_are_the_clients_fault(client: httpx.Client, path: str) -> None:
    for body, kind in BODIES:
        answer = client.post(path, content=body, headers={"content-type": kind})
        assert 400 <= answer.status_code < 500, (body[:40], answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_many_form_fields_are_refused(client: httpx.Client) -> None:
    data = {f"f{k}": "x" for k in range(200)}
    answer = client.post("/v1/images/edits", data=data, files={"image": photo()})
    assert answer.status_code == 400


def test_an_unexpected_failure_tells_no_secrets(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret path /srv/models")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine.pipeline(PLAIN), "denoise", broken)
        answer = client.post("/v1/portraits", json=ORDER)
    refused(answer, 500, "internal_error")
    assert "secret" not in answer.text


class _Photos(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = photo()
        self.send_response(302 if self.path == "/away" else 200)
        self.send_header("location", "http://127.0.0.1:1/")
        if self.path != "/endless":
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(10_000 if self.path == "/endless" else 1):
                self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def test_urls_are_fetched_from_allowed_hosts_only(tmp_path: Path) -> None:
    elsewhere = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Photos)
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    place = f"127.0.0.1:{elsewhere.server_port}"
    with running(tmp_path, fetch_hosts=(place,), max_upload_bytes=100_000) as server, server.client() as client:

        def ask(url: str) -> httpx.Response:
            return client.post("/v1/portraits", json={**ORDER, "pipeline": FACEID, "photos": [url]})

        assert ask(f"http://{place}/photo.png").status_code == 200
        refused(ask(f"http://{place}/away"), 400, "url_failed")
        refused(ask(f"http://{place}/endless"), 400, "too_large")
        for url in (
            f"http://localhost:{elsewhere.server_port}/",
            "http://127.0.0.1/",
            f"http://x@{place}/",
            "http://[::1/",
            f"https://{place}.evil.example/",
            "http://169.254.169.254/",
        ):
            refused(ask(url), 400, "url_refused")
    elsewhere.shutdown()
    elsewhere.server_close()


def test_without_keys_other_sites_pages_and_names_are_refused(tmp_path: Path) -> None:
    with running(tmp_path, cors_origins=("https://friend.example",)) as server, server.client() as client:
        refused(client.get("/v1/models", headers={"host": "evil.example"}), 421, "wrong_host")
        refused(client.get("/v1/models", headers={"host": "[::1"}), 421, "wrong_host")
        refused(
            client.post("/v1/portraits", json=ORDER, headers={"origin": "https://evil.example"}), 403, "foreign_origin"
        )
        assert client.get("/v1/models", headers={"origin": server.url}).status_code == 200
        friend = client.get("/v1/models", headers={"origin": "https://friend.example"})
        assert friend.headers["access-control-allow-origin"] == "https://friend.example"


def test_one_key_may_enrol_so_many_identities(tmp_path: Path) -> None:
    with running(tmp_path, max_identities=1) as server, server.client() as client:
        assert client.post("/v1/identities", files={"photo": photo()}).status_code == 201
        refused(client.post("/v1/identities", files={"photo": photo()}), 409, "too_many_identities")


def test_the_server_listens_to_others_while_one_uploads_slowly(server: Running, client: httpx.Client) -> None:
    address = httpx.URL(server.url)
    slow = [socket.create_connection((address.host, address.port or 0), timeout=20) for _ in range(20)]
    for connection in slow:
        connection.sendall(b"POST /v1/faces HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
    assert client.get("/v1/models").status_code == 200
    for connection in slow:
        connection.close()
    wait_until(lambda: client.get("/readyz").status_code == 200)


def test_pictures_are_kept_within_a_fixed_amount_of_memory() -> None:
    from idgen.service.pictures import Pictures

    pictures = Pictures(max_bytes=100, lifetime_s=3600)
    names = [pictures.put(b"x" * 40, "png") for _ in range(3)]
    assert pictures.get(names[0]) is None and pictures.get(names[2]) == (b"x" * 40, "png")
    expired = Pictures(lifetime_s=-1)
    assert expired.get(expired.put(b"x", "png")) is None
