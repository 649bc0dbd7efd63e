"""Every lever: exact ones give the plain path's numbers, approximate ones stay within their documented error."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import idgen
from idgen.adapters.lean import LeanBlocks
from idgen.adapters.linear import ONEDNN, WORTHWHILE, linear
from idgen.adapters.remember import Remembered, first_if_equal
from idgen.backbone import _may_overlap
from idgen.bench.inputs import Inputs
from idgen.bench.models import SIZES, Size
from idgen.bench.timing import relative_error
from idgen.bench.workloads import KINDS, Workload
from idgen.caches import TensorCache
from idgen.denoiser import Denoiser
from idgen.errors import BadRequest
from idgen.prepare import compile_model, prepare
from idgen.small_cards import CARDS
from idgen.speed import PRESETS, Levers, choose_levers
from tests import tiny

STEPS = 10
# Relative L2 error of the final latents of the nano model against the exact path, with room for other processors.
DOCUMENTED = {
    "guidance in half of the steps": (Levers(guidance_until=0.5), 0.03),
    "structure in half of the steps": (Levers(structure_until=0.5), 0.03),
    "structure on the conditional half": (Levers(structure_half=True), 0.25),
    "features kept for 2 steps": (Levers(cache_every=2), 0.06),
    "features kept for 3 steps": (Levers(cache_every=3), 0.08),
    "fast": (PRESETS["fast"], 0.06),
    "turbo": (PRESETS["turbo"], 0.10),
}


@pytest.fixture(scope="module")
def workload() -> Workload:
    return Workload.make("instantid", SIZES["nano"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_path_gives_the_stock_pipelines_latents(kind: str) -> None:
    workload = Workload.make(kind, SIZES["nano"])
    for guidance in (5.0, 1.0):
        if kind == "regions" and guidance == 1.0:
            continue
        largest, _ = relative_error(workload.ours(STEPS, guidance), workload.baseline()(STEPS, guidance))
        assert largest <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_lean_blocks_give_the_numbers_of_diffusers_own(kind: str) -> None:
    workload = Workload.make(kind, SIZES["nano"])
    lean, plain = workload.ours(STEPS), workload.ours(STEPS, levers=Levers(lean=False))
    assert relative_error(lean, plain)[0] <= 1e-5


def test_lean_blocks_leave_the_model_as_it_was() -> None:
    workload = Workload.make("instantid", SIZES["nano"])
    models = [workload.backbone.unet, workload.controlnet]
    before = [{name: set(m.__dict__) for name, m in model.named_modules()} for model in models]
    workload.ours(2)
    workload.ours(4, levers=PRESETS["turbo"])
    assert [{name: set(m.__dict__) for name, m in model.named_modules()} for model in models] == before


def test_a_block_that_is_not_plain_is_called_not_read() -> None:
    """A forward hook, as offloading and peft use, has to keep acting."""
    workload = Workload.make("ip-adapter", SIZES["nano"])
    unet = workload.backbone.unet
    reference = workload.ours(2)
    block = next(m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock")
    for layer in (block.ff.net[2], block.attn1.to_q, block.attn2.to_out[0]):
        handle = layer.register_forward_hook(lambda module, args, out: out * 1.5)
        with_hook = workload.ours(2)
        assert relative_error(with_hook, reference)[0] > 1e-4
        assert relative_error(with_hook, workload.ours(2, levers=Levers(lean=False)))[0] <= 1e-5
        handle.remove()
    with LeanBlocks(unet):
        assert "forward" in block.__dict__
    assert torch.equal(workload.ours(2), reference)


def test_offloaded_models_are_left_to_their_hooks() -> None:
    """Only a GPU can move weights away; here the hooks are there and must find their models as they expect them."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    workload = Workload.make("instantid", SIZES["nano"])
    exact = workload.ours(3)
    unet = workload.backbone.unet
    _, hook = cpu_offload_with_hook(unet, execution_device="cpu")
    assert relative_error(workload.ours(3), exact)[0] <= 1e-5
    with LeanBlocks(unet) as lean:
        assert not lean._changed
    hook.remove()
    for module in unet.modules():
        if isinstance(module, torch.nn.Linear):
            add_hook_to_module(module, AlignDevicesHook("cpu"))
    hooked = [m.forward for m in unet.modules() if isinstance(m, torch.nn.Linear)]
    assert relative_error(workload.ours(3), exact)[0] <= 1e-5
    assert [m.forward for m in unet.modules() if isinstance(m, torch.nn.Linear)] == hooked


def test_merged_loras_equal_loras_applied_one_by_one() -> None:
    pipeline = tiny.shared("ip-adapter-faceid-plusv2")
    run = lambda **s: pipeline.generate(tiny.person(), "x", seed=1, output="latent", **tiny.SMALL, **s)  # noqa: E731
    levers, pipeline._levers = pipeline._levers, Levers(lean=False)
    try:
        plain = run()
    finally:
        pipeline._levers = levers
    assert relative_error(run(), plain)[0] <= 1e-4


def test_linear_equals_torchs_own_below_and_above_the_switch() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, width in ((3, 8), (64, 256), (2 * WORTHWHILE // 256 // 256, 256)):
        x, weight = (torch.randn(n, width, generator=generator) for n in (rows, 256))
        bias = torch.randn(256, generator=generator)
        with torch.no_grad():
            assert torch.allclose(linear(x[None], weight, bias)[0], F.linear(x, weight, bias), atol=1e-3, rtol=1e-5)
            assert torch.allclose(linear(x, weight), F.linear(x, weight), atol=1e-3, rtol=1e-5)
    assert isinstance(ONEDNN, bool)


def test_equal_rows_are_computed_once_and_different_ones_are_not_merged() -> None:
    rows = torch.rand(1, 3, 4, 4)
    assert len(first_if_equal(rows.repeat(4, 1, 1, 1))) == 1
    assert len(first_if_equal(torch.cat([rows, rows + 1]))) == 2
    layer = torch.nn.Linear(2, 2)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    first = layer(torch.ones(1, 2))
    with Remembered(layer, None):
        kept = layer(torch.ones(1, 2))
        assert torch.equal(layer(torch.zeros(1, 2)), kept) and torch.equal(kept, first)
    assert not torch.equal(layer(torch.zeros(1, 2)), first)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_approximate_levers_stay_within_their_error_and_do_act(workload: Workload, name: str) -> None:
    levers, allowed = DOCUMENTED[name]
    error = relative_error(workload.ours(STEPS, levers=levers), workload.ours(STEPS))[1]
    assert 1e-6 < error <= allowed
    assert not levers.exact


def test_levers_run_the_networks_as_rarely_as_they_say(workload: Workload) -> None:
    calls: dict[str, list[int]] = {"unet": [], "control": [], "middle": []}
    handles = [
        workload.backbone.unet.register_forward_pre_hook(lambda m, a: calls["unet"].append(len(a[0]))),
        workload.controlnet.register_forward_pre_hook(lambda m, a: calls["control"].append(len(a[0]))),
        workload.backbone.unet.mid_block.attentions[0].register_forward_pre_hook(lambda *_: calls["middle"].append(1)),
    ]

    def count(levers: Levers) -> tuple[list[int], list[int], int]:
        for each in calls.values():
            each.clear()
        workload.ours(6, levers=levers)
        return list(calls["unet"]), list(calls["control"]), len(calls["middle"])

    try:
        assert count(Levers()) == ([2] * 6, [2] * 6, 6)
        assert count(Levers(guidance_until=0.5)) == ([2] * 3 + [1] * 3, [2] * 3 + [1] * 3, 6)
        assert count(Levers(structure_until=0.5)) == ([2] * 6, [2] * 3, 6)
        assert count(Levers(structure_half=True)) == ([2] * 6, [1] * 6, 6)
        assert count(Levers(cache_every=3)) == ([2] * 6, [2] * 2, 2)
        # Where guidance ends within a cached stretch, the deep features of the smaller batch are computed anew.
        assert count(Levers(cache_every=4, guidance_until=0.5)) == ([2] * 3 + [1] * 3, [2, 1, 1], 3)
    finally:
        for handle in handles:
            handle.remove()


def test_caching_every_step_and_whole_intervals_are_the_exact_path(workload: Workload) -> None:
    exact = workload.ours(4)
    assert torch.equal(workload.ours(4, levers=Levers(cache_every=1, guidance_until=1.0, structure_until=1.0)), exact)


@pytest.mark.parametrize(
    ("kind", "how"), [*((kind, "regional") for kind in KINDS), ("instantid", "full"), ("regions", "full")]
)
def test_compiled_models_give_the_same_numbers_and_are_not_compiled_again(kind: str, how: str) -> None:
    """Over scale, identity, prompt and seed; traced by dynamo but run eagerly, which keeps the test short."""
    check_compiled(kind, how, backend="eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: install g++")
def test_what_inductor_makes_of_the_blocks_gives_the_same_numbers_and_is_not_made_again() -> None:
    """The smallest case; benchmarks/compile_cpu.py has all kinds, and whole networks."""
    check_compiled("ip-adapter", "regional", backend="inductor")


def check_compiled(kind: str, how: str, backend: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (Workload.make(kind, SIZES["nano"]) for _ in range(2))
    levers = Levers(compile=how)
    for model in (compiled.backbone.unet, compiled.controlnet):
        if model is not None:
            compile_model(model, how, backend=backend)
    people = len(plain.conditioning().streams)
    try:
        graphs = None
        for seed, scale in enumerate((0.8, 0.2, 1.1)):
            for workload in (plain, compiled):
                workload.inputs = Inputs.random(workload.size, people=people, seed=seed)
                workload.inputs.scale = workload.inputs.structure_scale = scale
            made = compiled.ours(3, levers=levers)
            assert relative_error(made, plain.ours(3, levers=Levers(lean=False)))[0] <= 1e-5
            graphs = graphs or counters["stats"]["unique_graphs"]
            assert counters["stats"]["unique_graphs"] == graphs > 0
        assert not counters["graph_break"]
    finally:
        torch._dynamo.reset()


def test_approximate_levers_on_compiled_blocks_give_the_pictures_of_plain_ones() -> None:
    turbo = PRESETS["turbo"]
    torch._dynamo.reset()
    plain, compiled = (Workload.make("instantid", SIZES["nano"]) for _ in range(2))
    for model in (compiled.backbone.unet, compiled.controlnet):
        compile_model(model, "regional", backend="eager")
    try:
        made = compiled.ours(6, levers=turbo.change(compile="regional"))
        assert relative_error(made, plain.ours(6, levers=turbo))[0] <= 1e-5
    finally:
        torch._dynamo.reset()


def test_int8_layers_stay_within_their_error_and_act_with_and_without_lean_blocks() -> None:
    """torchao itself, on layers that are wide enough to be worth it."""
    pytest.importorskip(
        "torchao", reason="torchao is not installed: pip install torchao, which Windows has no wheel for"
    )
    wide = Size("wide", (32, 256), (0, 1), 32, 256, 32, 8, (8, 8, 8, 8), time=8)
    workload = Workload.make("instantid", wide)
    exact = workload.ours(4)
    workload.prepare(Levers(quantise="int8"))
    linear = [m for m in workload.backbone.unet.modules() if type(m) is torch.nn.Linear]
    assert sum(type(layer.weight) is not torch.nn.Parameter for layer in linear) == 60
    lean = workload.ours(4)
    assert 1e-4 < relative_error(lean, exact)[1] <= 0.03
    assert relative_error(workload.ours(4, levers=Levers(lean=False)), lean)[0] <= 1e-4
    with pytest.raises(BadRequest, match="already quantised"):
        workload.prepare(Levers(quantise="fp8"))


def test_every_lever_is_known_to_be_exact_or_not() -> None:
    """A new lever must be put here, and beside a test of its numbers."""
    exact = {"lean": False, "compile": "regional", "channels_last": True}
    approximate = {
        **{"guidance_until": 0.5, "structure_until": 0.5, "structure_half": True, "cache_every": 2},
        **{"tiny_vae": "taesdxl", "quantise": "int8", "few_step": "lcm"},
    }
    assert {field.name for field in fields(Levers)} == {*exact, *approximate}
    assert all(Levers(**{name: value}).exact for name, value in exact.items())  # type: ignore[arg-type]
    assert not any(Levers(**{name: value}).exact for name, value in approximate.items())  # type: ignore[arg-type]


def test_channels_last_is_exact_and_moves_no_value() -> None:
    workload = Workload.make("instantid", SIZES["nano"])
    weights = {n: w.clone() for n, w in workload.backbone.unet.state_dict().items()}
    before = workload.ours(4)
    workload.prepare(Levers(channels_last=True))
    assert relative_error(workload.ours(4), before)[0] <= 1e-5
    assert all(torch.equal(weights[n], w) for n, w in workload.backbone.unet.state_dict().items())


def test_the_unconditional_half_without_structure_gets_none() -> None:
    workload = Workload.make("instantid", SIZES["nano"])
    x = workload.inputs.noise
    make = lambda levers: Denoiser(  # noqa: E731
        workload.backbone.unet, workload.conditioning(), x, guided=True, attention="sdpa", levers=levers
    )
    with torch.no_grad(), make(Levers(structure_half=True)) as denoise:
        denoise(x, torch.tensor(500), 0, 1)
        assert denoise.residuals is not None
        half = denoise.residuals[1]
    with torch.no_grad(), make(Levers()) as denoise:
        denoise(x, torch.tensor(500), 0, 1)
        assert denoise.residuals is not None
        both = denoise.residuals[1]
    assert not half[0].any() and torch.allclose(half[1], both[1], atol=1e-5)


def test_speed_is_chosen_at_load_or_by_call() -> None:
    pipeline = tiny.load("instantid")
    run = lambda **s: pipeline.generate(tiny.person(), "x", seed=1, output="latent", **(tiny.SMALL | {"steps": 6}), **s)  # noqa: E731
    exact, turbo = run(), run(speed="turbo")
    assert not torch.equal(exact, turbo)
    assert torch.equal(run(speed=Levers()), exact)
    pipeline._levers = PRESETS["turbo"]
    assert torch.equal(run(), turbo) and torch.equal(run(speed="exact"), exact)
    files = tiny.FILES["instantid"]
    assert idgen.load("instantid", base=pipeline.backbone, speed="fast", **files).levers == PRESETS["fast"]


@pytest.mark.parametrize(
    ("levers", "message"),
    [
        ({"guidance_until": 1.5}, "share of the steps"),
        ({"cache_every": 0}, "1 or more"),
        ({"compile": "all"}, "regional"),
        ({"quantise": "int4"}, "fp8"),
        ({"compile": "full", "cache_every": 2}, "regional"),
        ({"warp": 9}, "no lever 'warp'"),
    ],
)
def test_wrong_levers_are_refused_by_name(levers: dict, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        Levers().change(**levers)


def test_presets_are_named_in_the_error_and_only_exact_is_exact() -> None:
    with pytest.raises(BadRequest, match="exact, fast or turbo"):
        choose_levers("ludicrous")
    assert [name for name, levers in PRESETS.items() if levers.exact] == ["exact"]


def test_quantising_without_torchao_or_without_the_hardware_names_the_cure() -> None:
    workload = Workload.make("ip-adapter", SIZES["nano"])
    with pytest.raises(BadRequest, match=r"pip install torchao|generation"):
        prepare(workload.backbone, [], Levers(quantise="fp8"))


def test_a_tiny_autoencoder_takes_the_place_of_the_bases(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from diffusers import AutoencoderTiny

    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(tmp_path)
    pipeline = tiny.load("text-to-image")
    latents = torch.randn(1, 4, 8, 8)
    before = pipeline.backbone.decode(latents)
    prepare(pipeline.backbone, [], Levers(tiny_vae=str(tmp_path)))
    after = pipeline.backbone.decode(latents)
    assert after.shape == before.shape and not torch.equal(after, before)
    with pytest.raises(idgen.IdgenError):
        prepare(pipeline.backbone, [], Levers(tiny_vae=str(tmp_path / "nothing")))


@pytest.mark.parametrize("pipeline", CARDS)
def test_small_cards_name_the_computed_peak_with_full_caches_and_need_no_memory_for_overlap(pipeline: str) -> None:
    results = Path(__file__).parent.parent / "benchmarks" / "results" / "speed-memory.json"
    computed = json.loads(results.read_text(encoding="utf-8"))
    title = {"instantid": "InstantID on SDXL", "ip-adapter": "IP-Adapter on SDXL"}[pipeline]
    caches = 2 * TensorCache().limit / 2**30
    for card in CARDS[pipeline].values():
        offload, lean = card.settings.get("offload"), card.settings.get("speed", Levers()).lean
        where = f"offload={offload}" if offload else "resident"
        peak = computed[f"{title}, lean={lean}"]["peak_gib"][f"{where}, VAE by tiles"]
        assert card.peak == pytest.approx(peak + caches, abs=0.06)
        vae = SimpleNamespace(use_tiling=card.settings["vae_tiling"])
        assert not _may_overlap(vae, torch.device("cuda"), offload)
