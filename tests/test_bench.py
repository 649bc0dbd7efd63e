"""The bench: its arithmetic, its suites on models of no size, and its reports. No test asserts a time."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from idgen.bench import cpu, first, gpu, gpu_parts, mini, report
from idgen.bench.face_rows import face_rows
from idgen.bench.machine import describe
from idgen.bench.models import SIZES, backbone, controlnet, controlnet_config, unet_config
from idgen.bench.photos import photos
from idgen.bench.stages import stages
from idgen.bench.timing import Summary, paired, quartiles, relative_error
from idgen.bench.workloads import Workload
from idgen.cli import app
from idgen.errors import BadRequest


def test_paired_takes_the_median_of_ratios_and_calls_everything_equally_often() -> None:
    calls: list[str] = []
    result = paired(lambda: calls.append("a"), {"b": lambda: calls.append("b")}, rounds=3, warm=False)
    assert calls == ["a", "b", "a"] * 3
    assert result.times["baseline"].count == 6 and result.times["b"].count == 3
    ratio = result.ratios["b"]
    assert ratio.low <= ratio.median <= ratio.high and ratio.noise_low <= ratio.noise_high


def test_summaries() -> None:
    summary = Summary.of([3.0, 1.0, 2.0])
    assert (summary.median, summary.p95, summary.lowest, summary.count) == (2.0, 3.0, 1.0, 3)
    assert quartiles([1.0]) == (1.0, 1.0)
    assert quartiles([1.0, 2.0, 3.0]) == (1.5, 2.5)
    a = torch.tensor([0.0, 2.0])
    assert relative_error(a, a) == (0.0, 0.0)


def test_the_machine_is_described_without_its_name() -> None:
    import platform

    about = json.dumps(describe())
    assert "torch" in about and platform.node() not in about.split('"')


@pytest.mark.parametrize(("name", "millions"), [("sdxl", 2567), ("sd15", 860)])
def test_the_full_size_configurations_have_the_public_number_of_parameters(name: str, millions: int) -> None:
    from diffusers import ControlNetModel, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(SIZES[name]))
        assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, rel=0.001)
        if name == "sdxl":
            control = ControlNetModel(**controlnet_config(SIZES[name]))
            assert sum(p.numel() for p in control.parameters()) / 1e6 == pytest.approx(1251, rel=0.001)


def test_random_models_repeat_and_have_no_dead_convolution() -> None:
    one, two = (controlnet(SIZES["nano"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert all(bool(w.any()) for w in one.parameters() if w.ndim > 1)
    assert backbone(SIZES["nano15"]).family == "sd15"


@pytest.fixture
def two_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faces a second of two photos, once: a test needs no more."""
    for suite in (cpu, gpu, mini):
        monkeypatch.setattr(suite, "face_rows", lambda *devices, rounds: face_rows(*devices, count=2, rounds=1))


@pytest.mark.usefixtures("two_photos")
def test_the_cpu_suite_reports_every_kind_and_lever(tmp_path: Path) -> None:
    results = cpu.suite(("nano",), kinds=("instantid",), steps=2, rounds=1)
    variants = {row["variant"] for row in results["rows"]}
    assert {"exact", *cpu.APPROXIMATE, "1 steps", "2 steps", "32 pixels", "128 pixels"} <= variants
    assert any("many at once" in variant and "ExecutionProvider" in variant for variant in variants)
    exact = results["rows"][0]
    assert exact["max_error_in_std"] <= 1e-5 and exact["ratio"]["median"] > 0
    written = report.save(results, tmp_path)
    assert json.loads(written[0].read_text()) == results
    assert "| instantid | exact |" in written[1].read_text()


NANO = {"size": "nano", "device": "cpu", "dtype": "float32", "steps": 2, "rounds": 1, "compiled": False}


@pytest.fixture
def no_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting one takes seconds; what it does is tested by itself."""
    for suite in (gpu_parts, mini):
        monkeypatch.setattr(suite, "first_picture_of", lambda what, **_: {"load": 1.0, "first picture": 2.0})


@pytest.mark.usefixtures("two_photos", "no_new_process")
def test_the_gpu_suite_runs_on_a_miniature_and_loses_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("IdentityNet on the conditional half", "turbo")
    monkeypatch.setattr(gpu_parts, "APPROXIMATE", {name: cpu.APPROXIMATE[name] for name in few})
    results = gpu.suite(**NANO)
    assert not [row for row in results["rows"] if "error" in row] and not results["not_reached"]
    variants = {row.get("variant") for row in results["rows"]}
    assert {"exact", "turbo", "batch 8", "one guided step", "VAE decode, one picture", "4 people"} <= variants
    assert {"1 steps", "32 pixels", "new process: first picture", "8 steps without guidance"} <= variants
    assert any("load IdentityNet" in str(variant) for variant in variants)
    assert all(row["part"] in results["done"] for row in results["rows"])
    batches = [row for row in results["rows"] if row.get("variant") == "batch 8"]
    assert [row["kind"] for row in batches] == ["ip-adapter", "instantid"]
    assert "batch 8" in report.markdown(results)


def _only(monkeypatch: pytest.MonkeyPatch, **parts: object) -> None:
    """A suite of a few parts, made of nothing."""
    monkeypatch.setattr(gpu.Suite, "run", lambda self: [self.part(n, 1, partial(w, self)) for n, w in parts.items()])


def test_every_row_of_the_gpu_suite_is_kept_before_the_next_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[str]] = []

    def part(suite: gpu.Suite) -> None:
        for name in ("a", "b"):
            suite.add(variant=name, s=float("nan"))
        assert kept == [["a"], ["a", "b"]]
        raise RuntimeError("the machine is gone")

    _only(monkeypatch, part=part)
    gpu.suite(**NANO, keep=lambda results: kept.append([row.get("variant", "error") for row in results["rows"]]))
    assert kept[-1] == ["a", "b", "error"]


def test_the_gpu_suite_goes_on_where_an_earlier_run_stopped_and_measures_failed_parts_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[str] = []

    def good(suite: gpu.Suite) -> None:
        done.append("good")
        suite.add(variant="good", s=1.0)

    def bad(suite: gpu.Suite) -> None:
        done.append("bad")
        suite.add(variant="half", s=1.0)
        if done.count("bad") == 1:
            raise RuntimeError("once")

    _only(monkeypatch, good=good, bad=bad)
    gpu.suite(**NANO, keep=lambda results: report.save_text(results, tmp_path))
    before = report.load(tmp_path, "h100")
    assert before is not None and [row.get("variant") for row in before["rows"]] == ["good", "half", None]
    gpu.suite(**NANO, keep=lambda results: report.save_text(results, tmp_path), before=before)
    after = report.load(tmp_path, "h100")
    assert after is not None and done == ["good", "bad", "bad"]
    assert [row["variant"] for row in after["rows"]] == ["good", "half"] and set(after["done"]) == {"good", "bad"}


def test_results_of_another_machine_or_kind_are_not_gone_on_from(tmp_path: Path) -> None:
    before = gpu.suite(**NANO, seconds=0)
    assert report.load(tmp_path, "h100") is None
    for wrong in ({"steps": 3}, {"machine": {**before["machine"], "gpu": "another"}}):
        with pytest.raises(BadRequest, match="earlier results"):
            gpu.suite(**NANO, before={**before, **wrong})
    (tmp_path / "speed-h100.json").write_text("[1]")
    with pytest.raises(BadRequest, match=r"speed-h100\.json"):
        report.load(tmp_path, "h100")


def test_the_gpu_suite_names_what_it_had_no_time_for() -> None:
    results = gpu.suite(**NANO, seconds=0)
    assert not results["rows"] and "ip-adapter: exact" in results["not_reached"]


def test_the_gpu_suites_baselines_are_stock_whatever_levers_are_applied_to_idgens_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """channels_last is a lever on a GPU: a baseline copied from a prepared model would have it too."""
    layout = torch.channels_last
    monkeypatch.setattr(Workload, "prepare", lambda self, levers: self.backbone.unet.to(memory_format=layout))
    suite = gpu.Suite(**NANO)
    for kind in ("ip-adapter", "instantid"):
        baseline, ours = suite.against(kind)
        stock = baseline.func.unet if kind == "instantid" else baseline.func.pipe.unet
        assert stock.conv_in.weight.is_contiguous() and not ours.backbone.unet.conv_in.weight.is_contiguous()


def test_a_baseline_compiles_each_network_once_in_channels_last_and_marks_the_steps_of_its_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[torch.nn.Module] = []
    marked: list[int] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, mode: compiled.append(model))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))
    for kind, networks in (("ip-adapter", 1), ("instantid", 2)):
        baseline = Workload.make(kind, SIZES["nano"]).baseline()
        expected = baseline(2)
        compiled.clear()
        baseline.compile()
        assert len(compiled) == networks and not baseline.graphs and not marked
        assert not any(network.conv_in.weight.is_contiguous() for network in compiled)
        baseline.graphs = True  # as it is on a GPU
        assert relative_error(baseline(2), expected)[0] < 1e-4 and len(marked) == 2
        marked.clear()


def test_the_mini_suite_names_gain_error_and_likeness_of_every_lever(
    two_photos: None, no_new_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mini, "APPROXIMATE", {"fast": cpu.APPROXIMATE["fast"]})
    monkeypatch.setattr(mini, "has_fast_bfloat16", lambda: True)
    results = mini.suite(steps=2, rounds=1, people=2, pipelines=("instantid",))
    judged = {row["variant"]: row for row in results["rows"] if row["part"].startswith("levers")}
    assert set(judged) == {"exact", *mini.APPROXIMATE, "bfloat16, exact", "bfloat16, fast", "bfloat16, turbo"}
    for name, row in judged.items():
        assert row["portraits"] == 4 and -1 <= row["likeness"] <= 1
        assert name == "exact" or (row["relative_l2_error"] > 0 and row["ratio"]["median"] > 0)
    titles = " ".join(dict.fromkeys(row["part"] for row in results["rows"]))
    assert all(word in titles for word in ("new process", "warm", "stages", "faces"))
    written = report.save(results, tmp_path)
    assert "## levers" in written[1].read_text() and "| instantid | fast |" in written[1].read_text()


def test_the_stages_of_a_portrait_are_all_there_and_leave_no_hook_behind() -> None:
    pipe = mini._load("instantid")
    split = stages(pipe, photos(1)[0], mini.PROMPTS[0], 2)
    names = {"faces", "text", "identity", "UNet", "IdentityNet", "VAE", "likeness"}
    assert names | {"rest", "all"} == set(split) and all(split[name] > 0 for name in names)
    assert not pipe.backbone.unet._forward_hooks and not pipe.backbone.vae.decoder._forward_pre_hooks


def test_a_new_process_reports_its_stages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["first", "random", "--size", "nano", "--steps", "1"])
    first.main()
    spent = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(spent) == [
        "start and import",
        "load",
        "first picture",
        "all until the first picture",
        "second picture",
    ]
    assert spent["all until the first picture"] >= spent["load"] + spent["first picture"]


def test_a_new_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(RuntimeError, match="a new process failed"):
        first.first_picture_of("instantid")


def test_photos_for_measurements_differ_from_each_other() -> None:
    from idgen.images import content_hash

    assert len({content_hash(photo) for photo in photos(10)}) == 10


def test_the_command_refuses_an_unknown_size_and_an_absent_gpu() -> None:
    for arguments in (
        ["bench", "--size", "huge"],
        ["bench", "--suite", "cpu", "--resume"],
        ["bench", "--suite", "h100", "--resume"],
        ["bench", "--suite", "h100", "--device", "cuda:77"],
    ):
        if "cuda:77" in arguments and torch.cuda.is_available():
            continue
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, BadRequest)


def test_live_bytes_counts_what_is_alive_at_once_and_no_view_of_what_was_there() -> None:
    from idgen.bench.memory import LiveBytes

    before = torch.empty(1000, device="meta")
    with LiveBytes([before]) as counter:
        before.view(10, 100).t()
        a = torch.empty(100, dtype=torch.float32, device="meta")
        b = a + 1
        del a
        c = b * 2
        assert counter.live == 800
        del b, c
    assert counter.peak == 800 and counter.live == 0


def test_memory_is_computed_and_the_presets_fit_their_cards() -> None:
    from idgen.bench.memory import card_peak, peaks
    from idgen.small_cards import CARDS, card_settings

    parts = peaks("nano", pixels=64)
    assert parts["one_step"] > 0 and parts["unet"] > parts["identity_keys_and_values"] > 0
    resident, offloaded = card_peak(parts), card_peak(parts, offload="model", vae_tiling=True)
    assert offloaded <= resident
    assert all(card.peak < size for presets in CARDS.values() for size, card in presets.items())
    assert card_settings("instantid", 24) == CARDS["instantid"][16].settings
    assert card_settings("ip-adapter-faceid", 10)["offload"] == "model"
    with pytest.raises(BadRequest, match="8 GB"):
        card_settings("instantid", 6)
