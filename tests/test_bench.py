"""The bench: its arithmetic, its suites on models of no size, and its reports. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from idgen.bench import cpu, gpu, report
from idgen.bench.machine import describe
from idgen.bench.models import SIZES, backbone, controlnet, controlnet_config, unet_config
from idgen.bench.timing import Summary, paired, quartiles, relative_error
from idgen.cli import app


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


def test_the_cpu_suite_reports_every_kind_and_lever(tmp_path: Path) -> None:
    results = cpu.suite(("nano",), kinds=("instantid",), steps=2, rounds=1)
    variants = {row["variant"] for row in results["rows"]}
    assert {"exact", *cpu.APPROXIMATE} <= variants
    exact = results["rows"][0]
    assert exact["max_error_in_std"] <= 1e-5 and exact["ratio"]["median"] > 0
    written = report.save(results, tmp_path)
    assert json.loads(written[0].read_text()) == results
    assert "| instantid | exact |" in written[1].read_text()


def test_the_gpu_suite_runs_on_a_miniature_and_loses_no_part(tmp_path: Path) -> None:
    results = gpu.suite(size="nano", device="cpu", dtype="float32", steps=2, rounds=1, compiled=False)
    failed = [row for row in results["rows"] if "error" in row and "torchao" not in row["error"]]
    assert not failed and not results["not_reached"]
    variants = {row.get("variant") for row in results["rows"]}
    assert {"exact", "turbo", "batch 8", "one guided step", "VAE decode, one picture", "4 identities"} <= variants
    assert "batch 8" in report.markdown(results)


def test_the_gpu_suite_names_what_it_had_no_time_for() -> None:
    results = gpu.suite(size="nano", device="cpu", dtype="float32", steps=1, rounds=1, compiled=False, seconds=0)
    assert not results["rows"] and "ip-adapter: eager" in results["not_reached"]


def test_the_command_refuses_an_unknown_size_and_an_absent_gpu() -> None:
    from idgen.errors import BadRequest

    for arguments in (["bench", "--size", "huge"], ["bench", "--suite", "h100", "--device", "cuda:77"]):
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
    from idgen.errors import BadRequest
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
