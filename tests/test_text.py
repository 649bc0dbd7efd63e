"""Prompts: nothing is cut, weights act, and ordinary parentheses stay text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idgen.errors import BadRequest
from idgen.text import encode_negative, encode_prompt, pad_together, split_weights
from tests import tiny

LONG = ", ".join(f"a man in the forest number {i}" for i in range(40))


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_a_long_prompt_is_encoded_whole(family: str) -> None:
    backbone = tiny.backbone(family)
    whole = encode_prompt(backbone, LONG)
    length = backbone.pipe.tokenizer.model_max_length
    assert whole.tokens.shape[1] > length and whole.tokens.shape[1] % length == 0
    other = encode_prompt(backbone, LONG + ", a bright red umbrella")
    assert not torch.equal(whole.tokens[:, -length:], other.tokens[:, -length:])


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_a_long_prompt_raises_no_false_alarm_and_is_not_written_to_the_log(
    family: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    encode_prompt(tiny.backbone(family), f"{LONG}, a secret")
    shown = caplog.text + "".join(capfd.readouterr())
    assert "truncated" not in shown and "longer" not in shown and "secret" not in shown


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_a_weight_moves_the_embedding_and_one_is_neutral(family: str) -> None:
    backbone = tiny.backbone(family)
    neutral = encode_prompt(backbone, "photo of a man in the forest").tokens
    one = encode_prompt(backbone, "photo of a (man:1.0) in the forest").tokens
    strong = encode_prompt(backbone, "photo of a (man:1.5) in the forest").tokens
    weak = encode_prompt(backbone, "photo of a (man:0.5) in the forest").tokens
    assert torch.allclose(one, neutral, atol=1e-4)
    assert (strong - neutral).abs().max() > 1e-3 and (weak - neutral).abs().max() > 1e-3


def test_a_long_prompt_renders_with_a_short_negative() -> None:
    pipeline = tiny.shared("instantid")
    out = pipeline.generate(tiny.person(), LONG, negative_prompt="lowres", seed=1, output="latent", **tiny.SMALL)
    short = pipeline.generate(tiny.person(), "a man", negative_prompt="lowres", seed=1, output="latent", **tiny.SMALL)
    assert out.isfinite().all() and not torch.equal(out, short)


def test_ordinary_parentheses_are_text() -> None:
    assert split_weights("a (small) dog: (cute), :) ((x))") == [("a (small) dog: (cute), :) ((x))", 1.0)]
    assert split_weights("a (red:1.3) hat") == [("a ", 1.0), ("red", 1.3), (" hat", 1.0)]


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_splitting_loses_no_text(text: str) -> None:
    try:
        parts = split_weights(text)
    except BadRequest:
        return
    rest = text
    for part, weight in parts:
        assert 0 <= weight <= 3
        assert part in rest
        rest = rest[rest.index(part) + len(part) :]
    weighted = sum(1 for _, weight in parts if weight != 1.0)
    assert weighted == 0 or len("".join(part for part, _ in parts)) < len(text)


def test_a_burning_weight_is_refused() -> None:
    with pytest.raises(BadRequest, match="above 3"):
        split_weights("a (red:9) hat")


def test_no_negative_is_zeros_where_the_base_asks_for_them() -> None:
    backbone = tiny.backbone()
    assert encode_negative(backbone, None).tokens.abs().max() == 0
    assert encode_negative(backbone, "").tokens.abs().max() > 0


def test_repeated_prompts_are_encoded_once() -> None:
    backbone = tiny.backbone()
    assert encode_prompt(backbone, "a man") is encode_prompt(backbone, "a man")
    stacked = pad_together([encode_prompt(backbone, "a man"), encode_prompt(backbone, LONG)], backbone)
    assert stacked.shape[0] == 2
