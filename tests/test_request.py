"""Requests: every field's bounds, named when broken."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idgen.errors import BadRequest
from idgen.request import MAX_SIDE, SEED_LIMIT, Request

BOUNDS: dict[str, tuple[float, float]] = {
    "steps": (1, 1000),
    "guidance": (0, 100),
    "identity_scale": (0, 3),
    "structure_scale": (0, 3),
    "structure_start": (0, 0.999),
    "structure_end": (0.001, 1),
    "seed": (0, SEED_LIMIT),
    "n": (1, 64),
    "width": (16, MAX_SIDE),
    "height": (16, MAX_SIDE),
    "strength": (0.001, 1),
}
WHOLE = {"steps", "seed", "n", "width", "height"}


@given(st.sampled_from(sorted(BOUNDS)), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_values_inside_the_bounds_are_taken(field: str, share: float) -> None:
    low, high = BOUNDS[field]
    value: Any = low + (high - low) * share
    if field in WHOLE:
        value = min(int(value), int(high))  # a float cannot hold the highest seed
    if field in ("width", "height"):
        value = max(16, value // 8 * 8)
    assert getattr(Request.create(**{field: value}), field) == value


@given(st.sampled_from(sorted(BOUNDS)), st.one_of(st.floats(allow_nan=True), st.integers(-(2**70), 2**70), st.text()))
@settings(max_examples=300, deadline=None)
def test_any_other_value_is_refused_and_the_field_named(field: str, value: Any) -> None:
    _, high = BOUNDS[field]
    try:
        request = Request.create(**{field: value})
    except BadRequest as error:
        assert error.field == field
        assert field in str(error)
    else:
        taken = getattr(request, field)
        assert math.isfinite(taken) and 0 <= taken <= max(high, 1000)


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"width": 100}, "width", "multiple of 8; the nearest is 96"),
        ({"witdh": 64}, "witdh", "did you mean 'width'"),
        ({"prompt": 3}, "prompt", "string"),
        ({"prompt": "a\x00b"}, "prompt", "NUL"),
        ({"mask": b"x"}, "mask", "needs image"),
        ({"structure_start": 0.5, "structure_end": 0.5}, "structure_start", "below structure_end"),
        ({"seed": SEED_LIMIT, "n": 2}, "seed", "seed"),
        ({"seed": -1}, "seed", "greater"),
    ],
)
def test_what_does_not_belong_together_is_explained(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        Request.create(**fields)
    assert caught.value.field == field
    assert words in str(caught.value)


def test_a_changed_copy_is_validated_again() -> None:
    request = Request.create(prompt="a", seed=1)
    assert request.change(seed=2).seed == 2 and request.seed == 1
    with pytest.raises(BadRequest):
        request.change(steps=0)
