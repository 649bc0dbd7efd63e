"""The command line: quick, clear, exit code 2 and no traceback on bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests import tiny

ADA = Path(__file__).parent.parent / "examples" / "ada" / "1.png"
FILES = ["--pipeline", "instantid", "--base", str(tiny.SDXL), "--device", "cpu",
         "--adapter", str(tiny.FILES["instantid"]["adapter"]),
         "--controlnet", str(tiny.FILES["instantid"]["controlnet"])]  # fmt: skip


def run(*arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    import os

    environment = os.environ | ({"IDGEN_HOME": str(home)} if home else {})
    return subprocess.run(
        [sys.executable, "-m", "idgen", *arguments], capture_output=True, text=True, timeout=180, check=False,
        env=environment,
    )  # fmt: skip


def test_import_brings_in_nothing_heavy() -> None:
    heavy = "torch diffusers transformers gradio insightface cv2 onnxruntime numpy"
    script = f"import idgen, sys; print([m for m in {heavy.split()!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


def test_help_names_every_command_and_imports_no_torch() -> None:
    script = (
        "import sys\nfrom idgen.cli import main\nsys.argv = ['idgen', '--help']\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code\nprint('torch' in sys.modules)\n"
    )
    out = subprocess.check_output([sys.executable, "-c", script], text=True)
    from idgen.cli import COMMANDS

    assert all(name in out for name in COMMANDS) and out.strip().endswith("False")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generatte"], "Did you mean 'generate'"),
        (["generate", "nobody.png", "a man", *FILES], "no file nobody.png"),
        (["generate", "a man", *FILES], "needs a photo"),
        (["generate", "x", "--steps", "0"], "steps"),
        (["generate", "x", "--out", "a.tiff"], "must end in"),
        (["generate", "x", "--out", "nowhere/a.png"], "no folder"),
        (["generate", "x", "--pipeline", "instant"], "There are:"),
        (["generate", "x", "--pipeline", "text-to-image", "--base", "/no/such/folder"], "no base model"),
        (["generate", "x", "--pipeline", "text-to-image", "--base", str(tiny.SDXL), "--width", "100"], "multiple of 8"),
        (["generate", "x", "--pipeline", "text-to-image", "--base", str(tiny.SDXL), "--scheduler", "best"], "unknown"),
        (["generate", "--like", "nothing.png"], "nothing.png"),
        (["generate", "."], "is a folder"),
        (["identity", "create", str(ADA), "--out", "ada.png"], "must end in .safetensors"),
        (["identity", "mix", "a.safetensors", "b.safetensors", "--out", "c"], "must end in .safetensors"),
        (["generate", "x", "--out", "/proc/a.png"], "/proc"),
        (["generate", str(ADA), "x", "--out", str(ADA)], "is the photo itself"),
        (["generate", "x", "--seed", "soon"], "seed"),
        (
            ["generate", "x", "--few-step", "lightening"],
            "choose lcm, lightning-4, hyper-sd-8 or dmd2, or leave it out.",
        ),
        (["generate", "x", "--speed", "ludicrous"], "choose exact, fast or turbo.\n"),
        (
            ["batch", "x.txt", "--out", "o", "--few-step", "lightening"],
            "choose lcm, lightning-4, hyper-sd-8 or dmd2, or leave it out.",
        ),
        (["batch", "x.txt", "--out", "o", "--speed", "ludicrous"], "choose exact, fast or turbo.\n"),
        (["serve", "--few-step", "lightening"], "choose lcm, lightning-4, hyper-sd-8 or dmd2, or leave it out."),
        (["demo", "--speed", "ludicrous"], "choose exact, fast or turbo.\n"),
        (["weights", "path", "instantidd"], "instantid"),
        (["weights", "convert", "nowhere", "copy"], "no file or folder nowhere"),
        (["weights", "pul"], "See: idgen weights --help"),
        (["weights", "pull"], "Missing argument 'names'. See: idgen weights pull --help"),
        (["faces", "nobody.png"], "nobody.png"),
        (["identity", "show", "nobody.safetensors"], "nobody.safetensors"),
        (["doctor", "--now"], "No such option: --now. See: idgen doctor --help"),
        (["bench", "--suite", "best"], "'--suite': 'best' is not one of"),
        (["demo", "--port", "x"], "See: idgen demo --help"),
        (["pipelines", "all"], "See: idgen pipelines --help"),
    ],
)
def test_bad_input_gets_one_error_exit_code_2_and_no_traceback(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from idgen.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as done:
        main(arguments)
    shown = capfd.readouterr().err
    assert done.value.code == 2, shown
    assert words in shown and "Traceback" not in shown
    assert shown.splitlines()[-1].startswith("idgen: error: ") and shown.count("rror:") == 1
    assert not list(tmp_path.iterdir()), "nothing half written"


def test_a_portrait_from_the_command_line_in_a_process_of_its_own(tmp_path: Path) -> None:
    tiny.person().save(tmp_path / "who.safetensors")
    out = tmp_path / "portrait.png"
    done = run("generate", str(tmp_path / "who.safetensors"), "a man", *FILES, "-n", "2", "--seed", "1", "--steps", "2",
               "--width", "64", "--height", "64", "--out", str(out), "--json", home=tmp_path / "home")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["seed"] for row in rows] == [1, 2]
    assert [Path(row["file"]).name for row in rows] == ["portrait-1.png", "portrait-2.png"]
    assert all(Image.open(row["file"]).size == (64, 64) for row in rows)


def test_pipelines_and_doctor_speak_json(tmp_path: Path) -> None:
    listed = run("pipelines", "--json", home=tmp_path)
    assert listed.returncode == 0 and {p["name"] for p in json.loads(listed.stdout)} >= {"instantid", "arc2face"}
    report = run("doctor", "--json", home=tmp_path)
    assert report.returncode in (0, 1) and json.loads(report.stdout)


def test_what_changes_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    from idgen.cli.generate import _warn_of_idle_options

    class Loaded:
        name = "arc2face"
        methods = (SimpleNamespace(speaks_text=True),)

    asked = {"pose": ADA, "strength": 0.5, "image": None}
    _warn_of_idle_options(tiny.shared("instantid"), "a man", {**asked, "image": ADA})
    _warn_of_idle_options(Loaded(), None, dict.fromkeys(asked))  # type: ignore[arg-type]
    assert not caplog.text
    _warn_of_idle_options(Loaded(), "a man", asked)  # type: ignore[arg-type]
    assert all(words in caplog.text for words in ("the prompt", "--pose", "--strength without --image"))


def test_speed_and_few_step_reach_the_models_from_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from idgen.cli import main
    from idgen.service.app import make_engine
    from idgen.speed import PRESETS

    class Reached(Exception):
        pass

    def stop(*given: Any, **settings: Any) -> None:
        raise Reached(settings.get("speed", given[-1]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("idgen.api.load", stop)
    monkeypatch.setattr("idgen.batch.render_batch", stop)
    monkeypatch.setattr("idgen.cli.serve.check_pipelines", lambda settings: None)
    monkeypatch.setattr("idgen.cli.serve.run", stop)
    flags = ["--speed", "fast", "--few-step", "lcm"]
    wanted = PRESETS["fast"].change(few_step="lcm")
    got: dict[str, Any] = {}
    for command in (["generate", "x"], ["batch", "x.txt", "--out", "o"], ["serve"]):
        with pytest.raises(Reached) as reached:
            main([*command, *flags])
        got[command[0]] = reached.value.args[0]
    with make_engine(got.pop("serve")) as engine, pytest.raises(Reached) as reached:
        engine.pipeline("auto")
    got["serve"] = reached.value.args[0]
    monkeypatch.setattr("idgen.engine.Engine", lambda settings, **_: stop(settings))
    with pytest.raises(Reached) as reached:
        main(["demo", *flags])
    got["demo"] = reached.value.args[0]["speed"]
    assert got == dict.fromkeys(("generate", "batch", "serve", "demo"), wanted)
    with pytest.raises(Reached) as reached:
        main(["batch", "x.txt", "--out", "o", "--speed", "exact"])
    assert reached.value.args == ("o",), "the default must not make finished pictures look changed"
