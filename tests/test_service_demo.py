"""The web demo inside the service: at ``/``, on the same engine, and behind a login where there are keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import tiny
from tests.serving import PLAIN, Running, running

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
            answer = called(client, "batch", data)
            assert "Upload the file itself" in answer, answer[:2000]
            assert "a-secret-key" not in answer


def called(client: httpx.Client, tab: str, data: list[Any]) -> str:
    """The events of one press of a tab's button, as a program would see them."""
    event = client.post(f"/gradio_api/call/{tab}", json={"data": data}).json()["event_id"]
    return client.get(f"/gradio_api/call/{tab}/{event}").text


def uploaded(client: httpx.Client, text: str) -> dict[str, Any]:
    """A prompt file as the page hands it in."""
    path = client.post("/gradio_api/upload", files={"files": ("rows.txt", text.encode())}).json()[0]
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def created(count: int = 1, steps: int = 2, size: str = "Pipeline's own") -> list[Any]:
    """The fields of the Create tab."""
    return [[], "x", "None", PLAIN, count, size, steps, 1.0, 0.5, 0.5, "", "default", False, 1, None]


LIMITS = {"max_n": 2, "max_steps": 4, "max_side": 64}


def test_every_tab_of_the_demo_keeps_to_the_services_limits(tmp_path: Path) -> None:
    rows = ["a --n 3", "b --steps 5", "c --size 72x64", "d --size 64x72", "e --size 64x64 --steps 2 --n 2"]
    with running(tmp_path, demo=True, **LIMITS) as server, server.client() as client:
        batch = called(client, "batch", [[], uploaded(client, "\n".join(rows)), None, PLAIN])
        for name, most in (("n", 2), ("steps", 4), ("width", 64), ("height", 64)):
            assert f"{name}: this server allows at most {most}." in batch, name
        assert "2 images, 4 rows failed." in batch
        assert server.engine.stats().images == 2, "nothing beyond the limits may reach the engine"
        for data, said in (
            (created(count=3), "n: this server allows at most 2."),
            (created(steps=5), "steps: this server allows at most 4."),
            (created(size="Wide 16:9"), "width: this server allows at most 64."),
        ):
            assert said in called(client, "generate", data)
        compared = called(client, "compare", [[], "x", "None", 1, 5, [PLAIN]])
        assert "steps: this server allows at most 4." in compared
        assert server.engine.stats().images == 2
        assert "2 portraits in" in called(client, "generate", created(count=2))


def test_the_services_deadline_holds_in_the_demo_too(tmp_path: Path) -> None:
    with running(tmp_path, demo=True, deadline_s=1e-6) as server, server.client() as client:
        file = uploaded(client, "a --size 64x64 --steps 2")
        for tab, data in (
            ("batch", [[], file, None, PLAIN]),
            ("generate", created()),
            ("compare", [[], "x", "None", 1, 2, [PLAIN]]),
        ):
            assert "the request was not finished within 1e-06 s." in called(client, tab, data), tab
