"""Identity: its bounds, the robust mean of several photos, mixing, and files that come back bit-equal."""

from __future__ import annotations

import contextlib
import itertools
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from idgen.embeddings import SAME_PERSON, robust_mean
from idgen.errors import BadRequest, BadWeights, IdgenError
from idgen.faces import Face, FaceExtractor
from idgen.identity import Identity
from tests.facepacks import pack, photo, recogniser

POINTS = [[76.5, 92.2], [147.4, 90.8], [112.1, 131.7], [81.9, 168.3], [142.6, 167.0]]


def _vector(seed: int, length: float = 20.0) -> np.ndarray:
    vector = np.random.default_rng(seed).normal(size=512)
    return (vector / np.linalg.norm(vector) * length).astype(np.float32)


def _whole(seed: int = 0) -> Identity:
    pixels = np.random.default_rng(seed).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    embeddings = {"glintr100": _vector(seed), "arcface": np.stack([_vector(seed + 1), _vector(seed + 2)])}
    return Identity(embeddings, POINTS, pixels, name="Ada Ω", keypoints_size=(640, 480))


class _Extractor:
    """Hands out prepared faces; a photo is an array that holds the face's number."""

    recogniser_name = "prepared"

    def __init__(self, embeddings: list[np.ndarray], sides: list[float] | None = None) -> None:
        sides = sides or [100.0] * len(embeddings)
        self.faces = [
            Face(
                np.array([0, 0, side, side], np.float32),
                np.array(POINTS, np.float32) + number,
                0.9,
                embedding,
                Image.new("RGB", (300 + number, 300)),
            )
            for number, (embedding, side) in enumerate(zip(embeddings, sides))
        ]
        self.photos = [np.full((2, 2), number, np.uint8) for number in range(len(embeddings))]

    def face(self, source, pick="largest") -> Face:
        return self.faces[int(np.asarray(source)[0, 0])]

    def face_of_each(self, sources, pick="largest") -> list[Face]:
        return [self.face(source, pick) for source in sources]


def _around(seed: int, noise: float, count: int) -> list[np.ndarray]:
    """Raw embeddings of one person: `noise` 1 means a cosine of about .7 to the centre, .5 to each other."""
    centre = _vector(seed, 1.0)
    rows = [centre + noise * _vector(1000 * seed + number + 1, 1.0) for number in range(count)]
    return [(row / np.linalg.norm(row) * (18 + number)).astype(np.float32) for number, row in enumerate(rows)]


# Building one.


def test_an_array_becomes_a_raw_read_only_embedding_of_unknown_origin():
    vector = _vector(1)
    ada = Identity(vector)
    vector[:] = 0
    assert ada.recogniser == "unknown" and ada.embeddings.keys() == {"unknown"}
    np.testing.assert_array_equal(ada.embedding, _vector(1))
    assert ada.embedding.dtype == np.float32 and np.linalg.norm(ada.normed) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError):
        ada.embedding[0] = 1
    np.testing.assert_array_equal(ada.for_recogniser("anything"), _vector(1))


def test_several_features_of_one_person_stay_separate_and_norm_to_one_direction():
    rows = np.stack([_vector(1), _vector(2, 5)])
    ada = Identity(rows, recogniser="glintr100")
    assert ada.embedding.shape == (2, 512) and ada.normed.shape == (512,)
    mean = rows[0] / 20 + rows[1] / 5
    np.testing.assert_allclose(ada.normed, mean / np.linalg.norm(mean), atol=1e-6)


def test_the_wrong_recogniser_is_an_error_that_names_what_is_needed_and_what_is_there():
    with pytest.raises(BadRequest, match=r"w600k_r50.*glintr100, arcface"):
        _whole().for_recogniser("w600k_r50")


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
    assert Identity(_vector(0), POINTS).keypoints.dtype == np.float64
    assert Identity(_vector(0), np.array(POINTS, np.float32)).keypoints.dtype == np.float32


def test_equality_looks_at_everything():
    assert _whole() == _whole() and hash(_whole()) == hash(_whole()) and _whole() != _whole(1)
    base = {"embedding": _vector(0), "keypoints": POINTS, "crop": np.zeros((8, 8), np.uint8), "name": "a"}
    ada = Identity(**base)
    changes = ({"embedding": _vector(1)}, {"keypoints": None}, {"crop": None}, {"name": "b"}, {"recogniser": "x"})
    for change in changes:
        assert Identity(**{**base, **change}) != ada
    assert ada != "ada"


def test_the_representation_names_the_person_and_what_is_known():
    assert repr(_whole()) == "<Identity Ada Ω: glintr100 [512], arcface [2, 512], keypoints, crop>"


def test_joined_keeps_both_recognisers_embeddings_and_fills_what_is_missing():
    one, two = Identity(_vector(0), recogniser="a"), Identity({"b": _vector(1), "a": _vector(2)}, POINTS, name="Ada")
    both = one.joined(two)
    assert list(both.embeddings) == ["a", "b"] and both.name == "Ada" and both.keypoints is not None
    np.testing.assert_array_equal(both.for_recogniser("a"), _vector(0))


# Several photos.


def test_one_photo_gives_its_raw_embedding_unchanged():
    prepared = _Extractor([_vector(3)])
    ada = Identity.from_photos(prepared.photos[0], prepared, name="Ada")
    np.testing.assert_array_equal(ada.embedding, _vector(3))
    assert (ada.recogniser, ada.name, ada.keypoints_size, ada.crop.size) == ("prepared", "Ada", (300, 300), (256, 256))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 1000), st.floats(0.1, 1.0), st.integers(2, 6), st.randoms())
def test_the_order_of_photos_has_no_influence_on_any_bit(seed, noise, count, random):
    prepared = _Extractor(_around(seed, noise, count))  # equally good faces: ties must not depend on order either
    shuffled = prepared.photos.copy()
    random.shuffle(shuffled)
    assert Identity.from_photos(prepared.photos, prepared) == Identity.from_photos(shuffled, prepared)


def test_the_length_is_the_mean_of_the_raw_lengths():
    prepared = _Extractor(_around(5, 0.6, 4))
    ada = Identity.from_photos(prepared.photos, prepared)
    assert np.linalg.norm(ada.embedding) == pytest.approx((18 + 19 + 20 + 21) / 4, rel=1e-5)


def test_more_photos_come_nearer_to_the_person_than_one():
    centre = _vector(9, 1.0)
    prepared = _Extractor(_around(9, 1.0, 6))
    ada = Identity.from_photos(prepared.photos, prepared)
    assert ada.normed @ centre > max(face.normed @ centre for face in prepared.faces) + 0.1


def test_one_poor_photo_moves_the_robust_mean_less_than_the_plain_one():
    centre, poor = _vector(9, 1.0), _vector(77, 1.0)
    rows = np.stack([*(row / np.linalg.norm(row) for row in _around(9, 0.4, 4)), 0.3 * centre + poor])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    plain = rows.mean(0) / np.linalg.norm(rows.mean(0))
    robust = robust_mean(rows.astype(np.float64))
    assert abs(robust @ poor) < abs(plain @ poor) and robust @ centre > plain @ centre


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_a_stranger_among_the_photos_is_named_and_left_out(order, tmp_path):
    prepared = _Extractor([*_around(5, 0.6, 3), _vector(99)])
    with pytest.warns(UserWarning, match="disagrees with the others") as caught:
        ada = Identity.from_photos([prepared.photos[number] for number in order], prepared)
    assert len(caught) == 1
    alone = Identity.from_photos(prepared.photos[:3], prepared)
    np.testing.assert_array_equal(ada.embedding, alone.embedding)


def test_photos_of_the_same_person_give_no_warning():
    prepared = _Extractor(_around(5, 1.0, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Identity.from_photos(prepared.photos, prepared)


@pytest.mark.parametrize("people", [[1, 2], [1, 2, 3], [1, 1, 2, 2]])
def test_without_a_majority_there_is_no_identity(people):
    counts = {person: iter(_around(person, 0.5, 2)) for person in set(people)}
    prepared = _Extractor([next(counts[person]) for person in people])
    with pytest.raises(BadRequest, match="different people") as caught:
        Identity.from_photos(prepared.photos, prepared)
    assert caught.value.field == "photos" and str(SAME_PERSON) in str(caught.value)


def test_keypoints_and_crop_come_from_the_largest_sure_face():
    prepared = _Extractor(_around(5, 0.6, 3), [60, 200, 80])
    ada = Identity.from_photos(prepared.photos, prepared)
    np.testing.assert_array_equal(ada.keypoints, np.array(POINTS, np.float32) + 1)
    assert ada.keypoints_size == (301, 300)


def test_no_photos_make_no_identity():
    with pytest.raises(BadRequest) as caught:
        Identity.from_photos([], _Extractor([]))
    assert caught.value.field == "photos"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("packs") / "tiny")


@pytest.fixture(scope="module")
def extractor(folder) -> FaceExtractor:
    return FaceExtractor(folder, device="cpu")


def test_real_photos_by_path_and_a_stranger_is_named_by_file(extractor, tmp_path):
    boxes = [(20, 20, 90, 110), (60, 30, 140, 130)]
    files = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "stranger.png"]
    for file, person in zip(files, ({"cyan": boxes[0]}, {"cyan": boxes[1]}, {"magenta": boxes[0]})):
        photo((200, 200), **person).save(file)
    with pytest.warns(UserWarning, match=r"stranger\.png"):
        ada = Identity.from_photos(files, extractor)
    assert ada.recogniser == "rec"
    with pytest.raises(BadRequest, match=r"stranger\.png"):
        Identity.from_photos([files[0], files[2]], extractor)


def test_smaller_crops_cut_from_the_kept_one_are_those_of_the_photo(extractor):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    picture = picture.resize((600, 600), Image.Resampling.BICUBIC)
    picture.paste(photo((200, 200), cyan=(40, 50, 130, 150)), (150, 150))
    ada, face = Identity.from_photos(picture, extractor), extractor.face(picture)
    for size in (256, 224):
        difference = np.abs(np.asarray(ada.aligned_crop(size)).astype(int) - np.asarray(face.crop(size)))
        assert difference.max() <= (1 if size == 224 else 0)
    assert ada.aligned_crop(112).size == (112, 112)
    for wrong in (100, 0):
        with pytest.raises(BadRequest):
            ada.aligned_crop(wrong)
    with pytest.raises(BadRequest, match="no crop"):
        Identity(_vector(0)).aligned_crop(224)


def test_a_crop_of_the_asked_size_is_handed_on_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    assert Identity(_vector(0), crop=pixels[:100]).aligned_crop(224).size == (224, 100), "not square: not aligned by us"
    assert np.array_equal(np.asarray(Identity(_vector(0), crop=pixels).aligned_crop(224)), pixels)


# Mixing and comparing.

_shares = st.floats(0, 1)
_seeds = st.integers(0, 10_000)


@settings(max_examples=60, deadline=None)
@given(_seeds, _seeds, _shares, st.floats(0.1, 100), st.floats(0.1, 100))
def test_mixing_walks_the_arc_at_even_speed_with_lengths_between(one, other, t, length, other_length):
    a, b = Identity(_vector(one, length)), Identity(_vector(other + 20_000, other_length))
    mixed = a.mix(b, t)
    angle = np.arccos(a.cosine(b))
    assert np.linalg.norm(mixed.embedding) == pytest.approx((1 - t) * length + t * other_length, rel=1e-4)
    assert np.arccos(min(1, mixed.cosine(a))) == pytest.approx(t * angle, abs=2e-3)
    np.testing.assert_allclose(b.mix(a, 1 - t).embedding, mixed.embedding, atol=1e-3 * max(length, other_length))


def test_the_ends_of_a_mix_are_the_two_people_themselves():
    a, b = _whole(0), _whole(5)
    assert a.mix(b, 0) == a and a.mix(b, 1) == b and a.mix(b, 0.0) is a


@pytest.mark.parametrize("t", [0.25, 0.5, 0.75])
def test_a_person_mixed_with_itself_or_its_double_stays_the_same(t):
    a, double = Identity(_vector(1)), Identity(_vector(1) * np.float32(1 + 1e-7))
    for other in (a, double):
        np.testing.assert_allclose(a.mix(other, t).embedding, a.embedding, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nudge", [0, 1e-12, 1e-7, 1e-4])
def test_opposite_embeddings_mix_to_something_finite_half_way_between(nudge):
    a = Identity(_vector(1, 10))
    b = Identity(-_vector(1, 10) + np.float32(nudge))
    middle = a.mix(b, 0.5)
    assert np.isfinite(middle.embedding).all() and np.linalg.norm(middle.embedding) == pytest.approx(10, rel=1e-3)
    assert middle.cosine(a) == pytest.approx(0, abs=1e-3)
    assert middle == a.mix(b, 0.5)


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan"), float("inf"), "half", None])
def test_a_share_outside_0_to_1_is_refused_by_name(t):
    with pytest.raises(BadRequest) as caught:
        _whole().mix(_whole(1), t)
    assert caught.value.field == "t"


def test_a_mix_covers_the_recognisers_that_both_know_and_takes_the_pose_of_the_nearer():
    a = Identity({"x": _vector(0), "y": _vector(1)}, POINTS, name="A")
    b = Identity({"y": _vector(2), "z": _vector(3)}, name="B")
    near_a, near_b = a.mix(b, 0.3), a.mix(b, 0.7)
    assert list(near_a.embeddings) == ["y"] and near_a.name == "A + B"
    assert near_a.keypoints is not None and near_b.keypoints is None


def test_people_known_by_different_recognisers_cannot_be_mixed_or_compared():
    a, b = Identity(_vector(0), recogniser="glintr100"), Identity(_vector(0), recogniser="arcface")
    for act in (lambda: a.mix(b, 0.5), lambda: a.cosine(b)):
        with pytest.raises(BadRequest, match=r"glintr100.*arcface"):
            act()
    assert a.cosine(Identity(_vector(0))) == pytest.approx(1), "unknown origin is believed to be the right one"
    assert a.mix(Identity(_vector(1)), 0.5).recogniser == "glintr100"


def test_different_numbers_of_features_cannot_be_mixed():
    with pytest.raises(BadRequest, match="cannot be mixed"):
        Identity(_vector(0)).mix(Identity(np.stack([_vector(1), _vector(2)])), 0.5)


def test_the_cosine_is_symmetric_and_stays_within_its_bounds():
    a, b = _whole(0), _whole(9)
    assert a.cosine(b) == b.cosine(a) and abs(a.cosine(b)) < 0.3 and a.cosine(a) <= 1
    assert a.cosine(a) == pytest.approx(1)


# Files.


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), st.integers(0, 3), min_size=1, max_size=3
    ),
    st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=20)),
    st.booleans(),
    st.booleans(),
)
def test_a_saved_identity_comes_back_bit_equal(tmp_path, shapes, name, posed, cropped):
    embeddings = {
        key: _vector(number) if not count else np.stack([_vector(number + each) for each in range(count)])
        for number, (key, count) in enumerate(shapes.items())
    }
    crop = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8) if cropped else None
    points = np.array(POINTS, np.float32) if posed else POINTS
    ada = Identity(embeddings, points, crop, name=name, keypoints_size=(640, 480) if posed else None)
    ada.save(tmp_path / "ada.safetensors")
    again = Identity.load(tmp_path / "ada.safetensors")
    assert again == ada and list(again.embeddings) == list(embeddings)
    assert all(again.embeddings[key].tobytes() == ada.embeddings[key].tobytes() for key in embeddings)
    assert again.keypoints.dtype == ada.keypoints.dtype
    assert Identity.from_bytes(ada.to_bytes()) == ada
    assert [file.name for file in tmp_path.iterdir()] == ["ada.safetensors"], "no temporary file is left"


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    file = tmp_path / "ada.safetensors"
    _whole(0).save(file)
    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(BadRequest, match="disk full"):
            _whole(1).save(file)
    assert Identity.load(file) == _whole(0) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("path", ["no/such/folder/ada.safetensors", ".", "a\0b"])
def test_a_place_that_cannot_be_written_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRequest) as caught:
        _whole().save(path)
    assert caught.value.field == "path" and list(tmp_path.iterdir()) == []


class _Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


def _file(**changes) -> bytes:
    tensors = {"embedding.a": _vector(0), **changes.pop("tensors", {})}
    metadata = {"format": "idgen-identity", "version": "1", "recognisers": '["a"]', **changes}
    return save({key: value for key, value in tensors.items() if value is not None}, metadata)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no identity"),
        (b"hello", "no identity"),
        (pickle.dumps(_Bomb()), "no identity"),
        (b"\xff" * 64, "no identity"),
        (b"\x10\0\0\0\0\0\0\0" + b"{" * 16, "no identity"),
        (_file()[:-100], "no identity"),
        (save({"weight": np.ones(3, np.float32)}), "but no identity"),
        (_file(version="2"), "Upgrade"),
        (_file(tensors={"embedding.a": None}), "missing"),
        (_file(tensors={"extra": np.ones(3, np.float32)}), "'extra' is not expected"),
        (_file(tensors={"embedding.a": np.zeros(512, np.float32)}), "zero"),
        (_file(tensors={"embedding.a": np.full(512, np.nan, np.float32)}), "NaN"),
        (_file(tensors={"embedding.a": np.ones(100, np.float32)}), "shape"),
        (_file(tensors={"keypoints": np.ones((4, 2), np.float32)}), "keypoints"),
        (_file(recognisers="[3]"), ""),
        (_file(recognisers="{"), ""),
        (_file(recognisers="[]"), ""),
        (_file(keypoints_size="[1, -2]"), "keypoints_size"),
        (_file(keypoints_size='"big"'), "keypoints_size"),
    ],
)
def test_a_file_that_is_no_intact_identity_is_bad_weights_and_named(content, words, tmp_path):
    file = tmp_path / "ada.safetensors"
    file.write_bytes(content)
    with pytest.raises(BadWeights) as caught:
        Identity.load(file)
    assert words in str(caught.value) and "ada.safetensors" in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_gives_an_identity_or_an_error_of_ours(data):
    content = bytearray(_file(keypoints_size="[3, 4]"))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, 300))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(IdgenError):
        Identity.from_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))


def test_a_missing_or_huge_file_is_refused_without_reading_it(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(BadRequest, match="no such identity"):
            Identity.load(path)
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(70 * 1024**2)
    with pytest.raises(BadWeights, match="too large"):
        Identity.load(tmp_path / "huge")


# The command, and what importing costs.


@pytest.fixture
def run():
    from typer.testing import CliRunner

    from idgen.cli.identity import identity

    return lambda *arguments: CliRunner().invoke(identity, [str(each) for each in arguments])


def test_identities_are_created_shown_and_mixed_from_the_command_line(run, folder, tmp_path):
    for name, person in (("ada", "cyan"), ("bob", "magenta")):
        photo((200, 200), **{person: (40, 40, 120, 140)}).save(tmp_path / f"{name}.png")
        made = tmp_path / f"{name}.safetensors"
        result = run("create", tmp_path / f"{name}.png", "--out", made, "--pack", folder, "--name", name)
        assert result.exit_code == 0 and "embedding by rec" in result.stdout
    files = [tmp_path / "ada.safetensors", tmp_path / "bob.safetensors"]
    result = run("mix", *files, "--t", ".3", "--out", tmp_path / "mix.safetensors", "--json")
    assert json.loads(result.stdout)["name"] == "ada + bob"
    shown = json.loads(run("show", tmp_path / "mix.safetensors", "--json").stdout)
    assert shown["embeddings"]["rec"]["shape"] == [512] and shown["crop"] == [256, 256]
    ada, bob, mix = (Identity.load(file) for file in (*files, tmp_path / "mix.safetensors"))
    assert mix == ada.mix(bob, 0.3)


def test_the_command_picks_a_face_warns_of_strangers_and_refuses_nonsense(run, folder, tmp_path):
    photo((200, 200), cyan=(10, 10, 60, 70), magenta=(100, 100, 180, 190)).save(tmp_path / "both.png")
    photo((200, 200), cyan=(10, 10, 60, 70)).save(tmp_path / "one.png")
    out = tmp_path / "out.safetensors"
    options = ("--out", out, "--pack", folder)
    assert run("create", tmp_path / "both.png", tmp_path / "one.png", "--pick", "30,30", *options).exit_code == 0
    result = run("create", *[tmp_path / f"{name}.png" for name in ("one", "one", "both")], *options)
    assert result.exit_code == 0 and "both.png" in result.stderr and "disagrees" in result.stderr
    assert isinstance(run("create", tmp_path / "one.png", "--pick", "left", *options).exception, BadRequest)


def test_another_recogniser_can_be_named_on_the_command_line(run, folder, tmp_path):
    photo((200, 200), cyan=(10, 10, 60, 70)).save(tmp_path / "one.png")
    other = recogniser(tmp_path / "other.onnx", seed=3)
    out = tmp_path / "out.safetensors"
    assert run("create", tmp_path / "one.png", "--out", out, "--pack", folder, "--recogniser", other).exit_code == 0
    assert Identity.load(out).recogniser == "other"


def test_importing_these_modules_imports_nothing_heavy():
    code = (
        "import sys, idgen.images, idgen.faces, idgen.identity, idgen.keypoints, idgen.identity_file\n"
        "print([name for name in ('torch', 'cv2', 'insightface', 'onnxruntime', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_equal_identities_are_equal_bytes():
    face = Identity(np.linspace(-1, 1, 512), np.arange(10.0).reshape(5, 2), name="Ada", keypoints_size=(64, 48))
    assert len({face.to_bytes() for _ in range(20)}) == 1
    assert Identity.from_bytes(face.to_bytes()) == face
