"""Identity: its bounds, mixing and comparing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idgen.errors import BadRequest
from idgen.identity import Identity
from tests.identities import POINTS, vector, whole


def test_an_array_becomes_a_raw_read_only_embedding_of_unknown_origin():
    mine = vector(1)
    ada = Identity(mine)
    mine[:] = 0
    assert ada.recogniser == "unknown" and ada.embeddings.keys() == {"unknown"}
    np.testing.assert_array_equal(ada.embedding, vector(1))
    assert ada.embedding.dtype == np.float32 and np.linalg.norm(ada.normed) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError):
        ada.embedding[0] = 1
    np.testing.assert_array_equal(ada.for_recogniser("anything"), vector(1))


def test_several_features_of_one_person_stay_separate_and_norm_to_one_direction():
    rows = np.stack([vector(1), vector(2, 5)])
    ada = Identity(rows, recogniser="glintr100")
    assert ada.embedding.shape == (2, 512) and ada.normed.shape == (512,)
    mean = rows[0] / 20 + rows[1] / 5
    np.testing.assert_allclose(ada.normed, mean / np.linalg.norm(mean), atol=1e-6)


def test_the_wrong_recogniser_is_an_error_that_names_what_is_needed_and_what_is_there():
    with pytest.raises(BadRequest, match=r"w600k_r50.*glintr100, arcface"):
        whole().for_recogniser("w600k_r50")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"embedding": np.zeros(512)}, "embedding"),
        ({"embedding": np.full(512, np.nan)}, "embedding"),
        ({"embedding": np.full(512, np.inf)}, "embedding"),
        ({"embedding": np.full(512, 1e300)}, "embedding"),
        ({"embedding": np.ones(511)}, "embedding"),
        ({"embedding": np.ones((0, 512))}, "embedding"),
        ({"embedding": np.ones((1, 2, 512))}, "embedding"),
        ({"embedding": np.stack([np.ones(512), np.zeros(512)])}, "embedding"),
        ({"embedding": "ada.png"}, "embedding"),
        ({"embedding": None}, "embedding"),
        ({"embedding": [[1], [1, 2]]}, "embedding"),
        ({"embedding": {}}, "embedding"),
        ({"embedding": {"": np.ones(512)}}, "recogniser"),
        ({"embedding": np.ones(512), "recogniser": 3}, "recogniser"),
        ({"embedding": np.ones(512), "keypoints": np.zeros((4, 2))}, "keypoints"),
        ({"embedding": np.ones(512), "keypoints": np.full((5, 2), np.nan)}, "keypoints"),
        ({"embedding": np.ones(512), "keypoints_size": (0, 5)}, "keypoints_size"),
        ({"embedding": np.ones(512), "keypoints_size": 5}, "keypoints_size"),
        ({"embedding": np.ones(512), "name": 7}, "name"),
    ],
)
def test_parts_out_of_their_bounds_are_refused_by_name(arguments, field):
    with pytest.raises(BadRequest) as caught:
        Identity(**arguments)
    assert caught.value.field == field


def test_keypoints_keep_the_precision_they_came_with():
    assert Identity(vector(0), POINTS).keypoints.dtype == np.float64
    assert Identity(vector(0), np.array(POINTS, np.float32)).keypoints.dtype == np.float32


def test_equality_looks_at_everything():
    assert whole() == whole() and hash(whole()) == hash(whole()) and whole() != whole(1)
    base = {"embedding": vector(0), "keypoints": POINTS, "crop": np.zeros((8, 8), np.uint8), "name": "a"}
    ada = Identity(**base)
    changes = ({"embedding": vector(1)}, {"keypoints": None}, {"crop": None}, {"name": "b"}, {"recogniser": "x"})
    for change in changes:
        assert Identity(**{**base, **change}) != ada
    assert ada != "ada"


def test_the_representation_names_the_person_and_what_is_known():
    assert repr(whole()) == "<Identity Ada Ω: glintr100 [512], arcface [2, 512], keypoints, crop>"


def test_joined_keeps_both_recognisers_embeddings_and_fills_what_is_missing():
    one, two = Identity(vector(0), recogniser="a"), Identity({"b": vector(1), "a": vector(2)}, POINTS, name="Ada")
    both = one.joined(two)
    assert list(both.embeddings) == ["a", "b"] and both.name == "Ada" and both.keypoints is not None
    np.testing.assert_array_equal(both.for_recogniser("a"), vector(0))


_shares = st.floats(0, 1)
_seeds = st.integers(0, 10_000)


@settings(max_examples=60, deadline=None)
@given(_seeds, _seeds, _shares, st.floats(0.1, 100), st.floats(0.1, 100))
def test_mixing_walks_the_arc_at_even_speed_with_lengths_between(one, other, t, length, other_length):
    a, b = Identity(vector(one, length)), Identity(vector(other + 20_000, other_length))
    mixed = a.mix(b, t)
    angle = np.arccos(a.cosine(b))
    assert np.linalg.norm(mixed.embedding) == pytest.approx((1 - t) * length + t * other_length, rel=1e-4)
    assert np.arccos(min(1, mixed.cosine(a))) == pytest.approx(t * angle, abs=2e-3)
    np.testing.assert_allclose(b.mix(a, 1 - t).embedding, mixed.embedding, atol=1e-3 * max(length, other_length))


def test_the_ends_of_a_mix_are_the_two_people_themselves():
    a, b = whole(0), whole(5)
    assert a.mix(b, 0) == a and a.mix(b, 1) == b and a.mix(b, 0.0) is a


@pytest.mark.parametrize("t", [0.25, 0.5, 0.75])
def test_a_person_mixed_with_itself_or_its_double_stays_the_same(t):
    a, double = Identity(vector(1)), Identity(vector(1) * np.float32(1 + 1e-7))
    for other in (a, double):
        np.testing.assert_allclose(a.mix(other, t).embedding, a.embedding, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nudge", [0, 1e-12, 1e-7, 1e-4])
def test_opposite_embeddings_mix_to_something_finite_half_way_between(nudge):
    a = Identity(vector(1, 10))
    b = Identity(-vector(1, 10) + np.float32(nudge))
    middle = a.mix(b, 0.5)
    assert np.isfinite(middle.embedding).all() and np.linalg.norm(middle.embedding) == pytest.approx(10, rel=1e-3)
    assert middle.cosine(a) == pytest.approx(0, abs=1e-3)
    assert middle == a.mix(b, 0.5)


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan"), float("inf"), "half", None])
def test_a_share_outside_0_to_1_is_refused_by_name(t):
    with pytest.raises(BadRequest) as caught:
        whole().mix(whole(1), t)
    assert caught.value.field == "t"


def test_a_mix_covers_the_recognisers_that_both_know_and_takes_the_pose_of_the_nearer():
    a = Identity({"x": vector(0), "y": vector(1)}, POINTS, name="A")
    b = Identity({"y": vector(2), "z": vector(3)}, name="B")
    near_a, near_b = a.mix(b, 0.3), a.mix(b, 0.7)
    assert list(near_a.embeddings) == ["y"] and near_a.name == "A + B"
    assert near_a.keypoints is not None and near_b.keypoints is None


def test_people_known_by_different_recognisers_cannot_be_mixed_or_compared():
    a, b = Identity(vector(0), recogniser="glintr100"), Identity(vector(0), recogniser="arcface")
    for act in (lambda: a.mix(b, 0.5), lambda: a.cosine(b)):
        with pytest.raises(BadRequest, match=r"glintr100.*arcface"):
            act()
    assert a.cosine(Identity(vector(0))) == pytest.approx(1), "unknown origin is believed to be the right one"
    assert a.mix(Identity(vector(1)), 0.5).recogniser == "glintr100"


def test_different_numbers_of_features_cannot_be_mixed():
    with pytest.raises(BadRequest, match="cannot be mixed"):
        Identity(vector(0)).mix(Identity(np.stack([vector(1), vector(2)])), 0.5)


def test_the_cosine_is_symmetric_and_stays_within_its_bounds():
    a, b = whole(0), whole(9)
    assert a.cosine(b) == b.cosine(a) and abs(a.cosine(b)) < 0.3 and a.cosine(a) <= 1
    assert a.cosine(a) == pytest.approx(1)


def test_importing_these_modules_imports_nothing_heavy():
    code = (
        "import sys, idgen.images, idgen.faces, idgen.identity, idgen.keypoints, idgen.identity_file\n"
        "print([name for name in ('torch', 'cv2', 'insightface', 'onnxruntime', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
