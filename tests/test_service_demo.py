"""The web demo inside the service: at ``/``, on the same engine, and behind a login where there are keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.serving import PLAIN, Running, running

pytest.importorskip("gradio")
KEY = "a-key-for-tests"


def page_and_api_live_together(server: Running, key: str | None = None) -> None:
    with server.client(key) as client:
        order = {"prompt": "x", "pipeline": PLAIN, **tiny.SMALL}
        assert client.post("/v1/portraits", json=order).status_code == 200
        assert client.get("/healthz").json() == {"status": "ok"}
        for missing in (client.get("/v1/nothing"), client.post("/v1/embeddings", json={})):
            assert missing.status_code == 404
            assert missing.json()["error"]["code"] == "not_found"


def test_the_demo_is_at_the_root_and_the_api_beside_it(tmp_path: Path) -> None:
    with running(tmp_path, demo=True) as server:
        with server.client() as client:
            page = client.get("/")
            assert page.status_code == 200 and "gradio" in page.text
            assert client.get("/config").json()["title"] == "idgen"
        page_and_api_live_together(server)


def test_with_keys_the_demo_asks_for_one(tmp_path: Path) -> None:
    with running(tmp_path, demo=True, api_keys=(KEY,)) as server:
        with server.client() as stranger:
            assert stranger.get("/config").status_code == 401
            wrong = stranger.post("/login", data={"username": "ada", "password": "wrong-key"})
            assert wrong.status_code == 400
            assert stranger.get("/config").status_code == 401
            assert stranger.post("/login", data={"username": "ada", "password": KEY}).status_code == 200
            assert stranger.get("/config").json()["title"] == "idgen"
        page_and_api_live_together(server, KEY)


@pytest.mark.parametrize("place", ["here", "http://photos.example.com/a.png"])
def test_the_demo_opens_uploaded_files_only(tmp_path: Path, place: str) -> None:
    secrets = tmp_path / "keys.txt"
    secrets.write_text("a-secret-key\n")
    named = {"path": str(secrets) if place == "here" else place, "meta": {"_type": "gradio.FileData"}}
    photo = [{"image": {**named, "path": named["path"].replace("keys.txt", "photo.png")}, "caption": None}]
    with running(tmp_path, demo=True) as server, server.client() as client:
        for data in ([[], named, None, PLAIN], [photo, None, None, PLAIN], [[], None, [named], PLAIN]):
            event = client.post("/gradio_api/call/batch", json={"data": data}).json()["event_id"]
            answer = client.get(f"/gradio_api/call/batch/{event}").text
            assert "Upload the file itself" in answer, answer[:2000]
            assert "a-secret-key" not in answer
