"""Settings by flag, environment and file; and that the service does not start where it should not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from idgen.errors import BadRequest, WeightsMissing
from idgen.service.settings import ServiceSettings

KEY = "a-secret-key"


def test_flags_win_over_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nqueue_size = 2\nmax_batch = 3\npipelines = ["instantid"]\n[aliases]\nx = "auto"\n')
    monkeypatch.setenv("IDGEN_SERVE_QUEUE_SIZE", "20")
    monkeypatch.setenv("IDGEN_SERVE_MAX_BATCH", "30")
    monkeypatch.setenv("IDGEN_SERVE_FETCH_HOSTS", "a.example, b.example:8080")
    settings = ServiceSettings.read(file, max_batch=300 - 100, host=None)
    assert (settings.port, settings.queue_size, settings.max_batch) == (1, 20, 200)
    assert settings.pipelines == ("instantid",) and settings.aliases == {"x": "auto"}
    assert settings.fetch_hosts == ("a.example", "b.example:8080")
    assert settings.host == "127.0.0.1"


def test_keys_come_from_settings_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDGEN_SERVE_API_KEYS", f"{KEY},another-key")
    file = tmp_path / "keys"
    file.write_text("# people\nthird-key\n\n")
    settings = ServiceSettings.read(api_key_file=file)
    assert settings.keys() == [KEY, "another-key", "third-key"]
    assert KEY not in repr(settings) and KEY not in str(settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_a_public_address_needs_a_key(host: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="api-key-file"):
        ServiceSettings.read(host=host)
    assert ServiceSettings.read(host=host, api_keys=[KEY]).host == host
    empty = tmp_path / "keys"
    empty.write_text("# none\n")
    with pytest.raises(BadRequest, match="holds no key"):
        ServiceSettings.read(host=host, api_key_file=empty)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_a_loopback_address_needs_none(host: str) -> None:
    assert ServiceSettings.read(host=host).keys() == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": 70000}, "port"),
        ({"queue_size": 0}, "queue_size"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"api_keys": ["short"], "host": "0.0.0.0"}, "8 characters"),
        ({"api_key_file": Path("nowhere") / "keys", "host": "0.0.0.0"}, "cannot be read"),
        ({"aliases": {"a": "b", "b": "auto"}}, "alias"),
    ],
)
def test_wrong_settings_are_named_without_secrets(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequest, match=named) as caught:
        ServiceSettings.read(**flags)
    assert "short" not in str(caught.value).replace("shorter", "")


def test_a_file_that_is_missing_broken_or_has_unknown_settings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    with pytest.raises(BadRequest, match="no settings file"):
        ServiceSettings.read(file)
    file.write_text("port = = 1")
    with pytest.raises(BadRequest, match="TOML"):
        ServiceSettings.read(file)
    file.write_text("prot = 1")
    with pytest.raises(BadRequest, match="prot"):
        ServiceSettings.read(file)


def test_the_command_refuses_what_nobody_could_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from idgen import cli
    from idgen.cli import serve

    started: list[ServiceSettings] = []
    monkeypatch.setattr(serve, "run", started.append)
    monkeypatch.setattr(serve, "check_pipelines", lambda settings: None)
    runner = CliRunner()
    assert isinstance(runner.invoke(cli.app, ["serve", "--host", "0.0.0.0"]).exception, BadRequest)
    result = runner.invoke(cli.app, ["serve", "--port", "0", "--pipeline", "instantid", "--no-batching"])
    assert result.exit_code == 0, result.output
    assert started[0].pipelines == ("instantid",) and not started[0].batching and started[0].port == 0


def test_a_pipeline_without_weights_is_refused_with_the_command_that_gets_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from idgen import registry
    from idgen.cli.serve import check_pipelines

    info = registry.PipelineInfo("instantid", "", ("sdxl",), (), {"sdxl": ("instantid_sdxl",)}, {})
    monkeypatch.setattr(registry, "pipelines", lambda: [info])
    with pytest.raises(WeightsMissing, match="weights pull instantid_sdxl"):
        check_pipelines(ServiceSettings(pipelines=("instantid",)))
    with pytest.raises(BadRequest, match="no pipeline"):
        check_pipelines(ServiceSettings(pipelines=("nonsense",)))
    with pytest.raises(WeightsMissing):
        check_pipelines(ServiceSettings())
