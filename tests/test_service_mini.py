"""The service as it comes, with the bundled model set: from a photo to a portrait that looks like the person."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator

import httpx
import openai
import pytest
import uvicorn

from idgen.service.app import create_app
from idgen.service.settings import ServiceSettings
from tests.conftest import REPOSITORY
from tests.serving import picture, wait_until

ADA, BEN = (REPOSITORY / "examples" / name / "1.png" for name in ("ada", "ben"))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = ServiceSettings(
        base="mini", device="cpu", demo=False, identities_folder=tmp_path_factory.mktemp("identities")
    )
    app = create_app(settings)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(app.state.service.ready.is_set, 120)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


def client(url: str) -> openai.OpenAI:
    http = httpx.Client(trust_env=False, timeout=120)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, http_client=http)


def test_an_edit_resembles_its_person_and_another_person_gives_another_picture(url: str) -> None:
    answer = client(url).images.edit(image=ADA, prompt="a photo of a person", n=2, extra_body={"seed": 3})
    assert answer.model == "instantid" and answer.size == "128x128"
    for datum in answer.data:
        assert datum.likeness is not None and datum.likeness > 0.1
    with httpx.Client(base_url=url, trust_env=False, timeout=120) as http:
        ben = http.post("/v1/identities", files={"photo": BEN.read_bytes()}).json()["id"]
        order = {"prompt": "a photo of a person", "identity": ben, "seed": 3}
        other = http.post("/v1/portraits", json=order).json()["portraits"][0]
    ada = picture(base64.b64decode(answer.data[0].b64_json))
    assert abs(ada - picture(base64.b64decode(other["image"]))).mean() > 5


@pytest.mark.parametrize("pipeline", ["instantid", "ip-adapter-faceid", "ip-adapter-faceid-plusv2", "arc2face"])
def test_an_enrolled_person_works_with_every_bundled_pipeline(url: str, pipeline: str) -> None:
    with httpx.Client(base_url=url, trust_env=False, timeout=120) as http:
        assert pipeline in [model["id"] for model in http.get("/v1/models").json()["data"]]
        ada = http.post("/v1/identities", files={"photo": ADA.read_bytes()}).json()["id"]
        order = {"prompt": "a photo of a person", "identity": ada, "pipeline": pipeline, "seed": 1, "steps": 8}
        answer = http.post("/v1/portraits", json=order)
    assert answer.status_code == 200, answer.text
    assert answer.json()["pipeline"] == pipeline
