"""The official ``openai`` client against a real server, unchanged."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests import serving
from tests.serving import FACEID, PLAIN, Running, photo, picture, running, same

KEY = "a-key-for-tests"
EXTRA = {"steps": 3, "seed": 5}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("openai")
    with running(folder, api_keys=(KEY,), aliases={"gpt-image-1": "auto"}) as server:
        yield server


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    http = httpx.Client(trust_env=False)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, http_client=http)


def decoded(datum: Any) -> np.ndarray:
    return picture(base64.b64decode(datum.b64_json))


def test_an_edit_with_one_photo_gives_a_portrait(client: openai.OpenAI) -> None:
    answer = client.images.edit(image=photo(), prompt="an astronaut", model=FACEID, size="64x64", extra_body=EXTRA)
    assert decoded(answer.data[0]).shape == (64, 64, 3)
    assert answer.size == "64x64" and answer.output_format == "png" and answer.created > 0
    assert answer.data[0].seed == 5  # idgen's own fields come along


def test_an_edit_with_two_photos_and_n_2_gives_two_portraits_by_consecutive_seeds(client: openai.OpenAI) -> None:
    files = [("a.png", photo()), ("b.png", photo(70))]
    both = client.images.edit(image=files, prompt="an astronaut", n=2, size="64x64", extra_body=EXTRA).data
    again = client.images.edit(
        image=files, prompt="an astronaut", n=1, size="64x64", extra_body={**EXTRA, "seed": 6}
    ).data
    one = client.images.edit(image=files[0], prompt="an astronaut", n=1, size="64x64", extra_body=EXTRA).data
    assert [datum.seed for datum in both] == [5, 6]
    assert not same(decoded(both[0]), decoded(both[1]))
    assert same(decoded(both[1]), decoded(again[0]))
    assert not np.array_equal(decoded(both[0]), decoded(one[0]))  # the second photo counts


def test_streaming_an_edit_sends_partial_images_and_then_the_whole_one(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"image": photo(), "prompt": "an astronaut", "size": "64x64"}
    events = list(client.images.edit(**fields, stream=True, partial_images=2, extra_body={"steps": 6, "seed": 5}))
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    whole = client.images.edit(**fields, extra_body={"steps": 6, "seed": 5}).data[0]
    assert same(decoded(events[-1]), decoded(whole))
    assert decoded(events[0]).shape == (64, 64, 3) and not same(decoded(events[0]), decoded(events[1]))
    assert events[-1].usage.total_tokens == 0


def test_generations_work_without_a_person_and_stream(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a sailor", model=PLAIN, size="64x64", extra_body=EXTRA)
    assert decoded(answer.data[0]).shape == (64, 64, 3)
    events = list(client.images.generate(prompt="a sailor", size="64x64", stream=True, extra_body=EXTRA))
    assert [event.type for event in events] == ["image_generation.completed"]
    assert same(decoded(events[0]), decoded(answer.data[0]))


def test_generations_of_an_enrolled_person_equal_edits_with_the_photo(server: Running, client: openai.OpenAI) -> None:
    with server.client(KEY) as http:
        identity = http.post("/v1/identities", files={"photo": photo()}).json()["id"]
    enrolled = client.images.generate(prompt="x", size="64x64", extra_body={**EXTRA, "identity": identity})
    uploaded = client.images.edit(image=photo(), prompt="x", size="64x64", extra_body=EXTRA)
    assert same(decoded(enrolled.data[0]), decoded(uploaded.data[0]))


def test_a_mask_changes_the_photo_where_it_is_transparent_only(client: openai.OpenAI) -> None:
    mask = Image.new("RGBA", (240, 240), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 120, 240))
    answer = client.images.edit(
        image=photo(), mask=serving.png(mask), prompt="x", size="64x64", extra_body={**EXTRA, "strength": 1.0}
    )
    other = client.images.edit(
        image=photo(),
        mask=serving.png(mask),
        prompt="x",
        size="64x64",
        extra_body={"steps": 3, "seed": 6, "strength": 1.0},
    )
    difference = np.abs(decoded(answer.data[0]) - decoded(other.data[0])).max(axis=(0, 2))
    # The tiny VAE looks a few latents far, so the borders of the halves mix.
    assert difference[:8].max() > 2 * max(1, difference[-8:].max())


def test_jpeg_webp_and_urls_are_given_when_asked_for(client: openai.OpenAI) -> None:
    for kind in ("jpeg", "webp"):
        answer = client.images.generate(
            prompt="x", size="64x64", output_format=kind, output_compression=80, extra_body=EXTRA
        )
        assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).format == kind.upper()
    answer = client.images.generate(prompt="x", size="64x64", response_format="url", extra_body=EXTRA)
    assert answer.data[0].b64_json is None
    response = httpx.get(answer.data[0].url, trust_env=False)
    assert response.headers["content-type"] == "image/png" and picture(response.content).shape == (64, 64, 3)


def test_models_lists_the_pipelines(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [FACEID, PLAIN]
    assert client.models.retrieve(PLAIN).owned_by == "idgen"


def test_an_alias_stands_for_a_pipeline(client: openai.OpenAI) -> None:
    answer = client.images.edit(image=photo(), prompt="x", model="gpt-image-1", size="64x64", extra_body=EXTRA)
    assert answer.model == FACEID


def body_of(error: openai.APIStatusError) -> dict[str, Any]:
    assert isinstance(error.body, dict)
    assert set(error.body) == {"message", "type", "param", "code"}
    return error.body


def test_errors_come_in_openais_format(server: Running, client: openai.OpenAI) -> None:
    grey = serving.png(Image.new("RGB", (64, 64), "grey"))
    with pytest.raises(openai.BadRequestError, match="no face") as caught:
        client.images.edit(image=grey, prompt="x", model=FACEID, size="64x64", extra_body=EXTRA)
    assert body_of(caught.value)["code"] == "no_face_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=b"no photo", prompt="x")
    assert body_of(caught.value) | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": "image",
        "code": "bad_image",
    }
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="x", size="63x64", extra_body=EXTRA)
    assert body_of(caught.value)["param"] == "width"
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="x", extra_body={"stepz": 3})
    assert body_of(caught.value)["param"] == "stepz"
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="x", model="dall-e-9")
    assert body_of(caught.value)["code"] == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="wrong").models.list()
    assert body_of(caught.value)["code"] == "invalid_api_key"
    assert caught.value.request_id


def test_an_error_while_streaming_is_raised_by_the_client(client: openai.OpenAI) -> None:
    grey = serving.png(Image.new("RGB", (64, 64), "grey"))
    with pytest.raises(openai.APIError, match="no face"):
        list(client.images.edit(image=grey, prompt="x", stream=True, size="64x64", extra_body=EXTRA))


def test_the_async_client_works_too(server: Running) -> None:
    import asyncio

    async def many() -> list[Any]:
        http = httpx.AsyncClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, http_client=http) as client:
            orders = [
                client.images.edit(image=photo(), prompt="x", size="64x64", extra_body={"steps": 3, "seed": seed})
                for seed in range(4)
            ]
            return await asyncio.gather(*orders)

    assert [answer.data[0].seed for answer in asyncio.run(many())] == [0, 1, 2, 3]


def test_the_clients_photo_never_touches_the_servers_disk(
    client: openai.OpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IDGEN_HOME", str(tmp_path))
    client.images.edit(image=photo(), prompt="x", size="64x64", extra_body=EXTRA)
    assert not list(tmp_path.rglob("*.*"))
