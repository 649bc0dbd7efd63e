"""The OpenAPI description: complete, with examples, and true under fire (schemathesis)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.generation import GenerationMode

from tests.serving import Running, running

ROUTES = {
    "/v1/images/edits",
    "/v1/images/generations",
    "/v1/models",
    "/v1/models/{model}",
    "/v1/portraits",
    "/v1/faces",
    "/v1/identities",
    "/v1/identities/{identity_id}",
    "/v1/files/{name}",
    "/healthz",
    "/readyz",
    "/metrics",
}

FEW = hypothesis.settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    # Whatever schemathesis dreams up must not keep the tests busy for long.
    limits: dict[str, Any] = {"max_side": 64, "max_steps": 2, "max_n": 1, "deadline_s": 2}
    with running(tmp_path_factory.mktemp("schema"), **limits) as server:
        yield server


@pytest.fixture(scope="module")
def description(server: Running) -> dict[str, Any]:
    return httpx.get(f"{server.url}/openapi.json", trust_env=False).json()


def test_every_route_is_described(description: dict[str, Any]) -> None:
    assert set(description["paths"]) == ROUTES
    for path, operations in description["paths"].items():
        for operation in operations.values():
            assert operation.get("description") or operation.get("summary"), path
            if path.startswith("/v1"):
                assert "4XX" in operation["responses"] and "422" not in operation["responses"], path


def test_orders_have_examples_that_are_valid(description: dict[str, Any]) -> None:
    from idgen.service.schemas import ImagesOrder, PortraitsOrder

    body = description["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    for example in body["schema"].get("examples") or body["examples"]:
        ImagesOrder.model_validate(example)
    examples = description["components"]["schemas"]["PortraitsOrder"]["examples"]
    for example in examples:
        PortraitsOrder.model_validate(example)
    assert len(examples) >= 2


def test_the_edit_form_is_described_with_its_files(description: dict[str, Any]) -> None:
    content = description["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    fields = content["multipart/form-data"]["schema"]["properties"]
    assert fields["image"]["items"]["format"] == "binary"
    assert {"mask", "prompt", "n", "size", "model", "seed", "steps", "stream"} <= set(fields)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", sorted(ROUTES))
def test_nothing_that_fits_or_breaks_the_schema_makes_the_server_fail(
    server: Running, description: dict[str, Any], path: str, mode: GenerationMode
) -> None:
    operations = schemathesis.openapi.from_dict(description)[path]
    statuses = []
    for method in operations:
        cases = operations[method].as_strategy(generation_mode=mode)

        @FEW
        @hypothesis.given(case=cases)
        def fire(case: schemathesis.Case) -> None:
            response = case.call(base_url=server.url, timeout=60)
            statuses.append(response.status_code)
            assert response.status_code < 500, case.as_curl_command()
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        try:
            fire()
        except hypothesis.errors.Unsatisfiable:  # nothing in this operation can be wrong
            assert mode is GenerationMode.NEGATIVE
    assert statuses or mode is GenerationMode.NEGATIVE
