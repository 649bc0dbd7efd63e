"""``idgen doctor``: a report that never crashes, never uses the network, and names the cure."""

from __future__ import annotations

import importlib.metadata
import json
import socket
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from idgen import doctor
from idgen.cli.doctor import doctor as command

app = typer.Typer()
app.command()(command)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the doctor must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("IDGEN_HOME", str(tmp_path))
    monkeypatch.delenv("IDGEN_COMMERCIAL_ONLY", raising=False)


def fake_pipelines(monkeypatch: pytest.MonkeyPatch, **bases: tuple[bool, bool | str]) -> None:
    """Make the registry say: one pipeline; base -> (are the weights here, do the licences allow commercial use)."""
    info = SimpleNamespace(
        name="some-method",
        description="for tests",
        bases=tuple(bases),
        available=tuple(base for base, (here, _) in bases.items() if here),
        missing={base: ("buffalo_l", "mini-thing") for base, (here, _) in bases.items() if not here},
        commercial={base: terms for base, (_, terms) in bases.items()},
    )
    monkeypatch.setattr("idgen.registry.pipelines", lambda: [info])


def test_report_on_this_machine() -> None:
    report = doctor.diagnose()
    assert report.versions["idgen"] and report.devices[-1].name == "cpu"
    assert report.choice["device"] in ("cpu", "cuda", "mps") and report.choice["dtype_reason"]
    assert "CPUExecutionProvider" in report.onnxruntime["providers"]
    assert report.weights["hub_cache_free"] > 0
    names = {package.name for package in report.packages}
    assert {"torch", "diffusers", "gradio", "xformers"} <= names and "idgen" not in names
    assert {state.name for state in report.pipelines} >= {"instantid", "arc2face", "ip-adapter"}
    json.dumps(report.as_dict())


def test_human_report_and_json_agree_on_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    fake_pipelines(monkeypatch, sdxl=(False, False), sd15=(False, True))
    for arguments in ([], ["--json"]):
        assert run(app, arguments).exit_code == 1
    text = run(app, []).output
    assert "sdxl: lacks buffalo_l" in text and "idgen weights pull buffalo_l --accept-licence" in text
    assert "no pipeline can run" in text
    fake_pipelines(monkeypatch, sdxl=(True, False), sd15=(False, True))
    assert run(app, []).exit_code == 0 and "runs on sdxl" in run(app, []).output
    assert json.loads(run(app, ["--json"]).stdout)["can_run"] is True


def test_commercial_only_refuses_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pipelines(monkeypatch, sdxl=(True, False), sd15=(True, "unclear"), mini=(True, True))
    monkeypatch.setenv("IDGEN_COMMERCIAL_ONLY", "1")
    report = doctor.Report(choice={"device": "cpu"})
    doctor._pipelines(report)
    (state,) = report.pipelines
    assert state.runs_on == ["mini"] and report.can_run
    assert state.refused == {"sdxl": "not for commercial use", "sd15": "unclear licence"}


def test_a_broken_part_is_a_line_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("libcuda went away")

    monkeypatch.setattr("idgen.registry.pipelines", broken)
    monkeypatch.setattr("idgen.backbone.choose_device", broken)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1 and "libcuda went away" in result.output and "Traceback" not in result.output


def test_missing_and_old_packages_name_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    versions = {"diffusers": "0.1", "xformers": None, "peft": None, "opencv-python-headless": None}
    versions |= {"opencv-python": "4.10", "onnxruntime-gpu": "1.20"}

    def version(name: str) -> str:
        found = versions.get(name) if name in versions else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    report = doctor.Report()
    doctor._packages(report)
    cures = {package.name: package.cure for package in report.packages}
    assert cures["diffusers"].startswith('pip install --upgrade "diffusers>=')
    assert cures["peft"].startswith('pip install "peft>=') and cures["xformers"] == 'pip install "idgen[cuda]"'
    assert cures["opencv-python"] == ""  # the same module by another name
    assert any("overwrite each other" in problem for problem in report.problems)
    assert any("peft is missing" in problem for problem in report.problems)
    assert not any("xformers" in problem for problem in report.problems)  # optional


def test_onnxruntime_that_falls_back_to_the_cpu_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    gpu = [doctor.Device("cuda:0", "a card")]
    report = doctor.Report(devices=gpu)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    doctor._onnxruntime(report)
    assert "build without CUDA" in report.problems[0] and "onnxruntime-gpu" in report.problems[0]

    report = doctor.Report(devices=gpu)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **kwargs: session)
    doctor._onnxruntime(report)
    assert report.onnxruntime["cuda_loads"] is False and "fell back" in report.problems[0]


def test_the_tiny_graph_is_a_graph() -> None:
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(doctor._TINY_ONNX, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.array([3.0], np.float32)})
    assert y.tolist() == [-3.0]
