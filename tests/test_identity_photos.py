"""Identities from photos: the robust mean of several, crops, and the command ``idgen identity``."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from idgen.embeddings import SAME_PERSON, robust_mean
from idgen.errors import BadRequest
from idgen.faces import Face, FaceExtractor
from idgen.identity import Identity
from tests.facepacks import pack, photo, recogniser
from tests.identities import POINTS, vector


class _Extractor:
    """Hands out prepared faces; a photo is an array that holds the face's number."""

    recogniser_name = "prepared"

    def __init__(
        self, embeddings: list[np.ndarray], sides: list[float] | None = None, scores: list[float] | None = None
    ) -> None:
        sides, scores = sides or [100.0] * len(embeddings), scores or [0.9] * len(embeddings)
        self.faces = [
            Face(
                np.array([0, 0, side, side], np.float32),
                np.array(POINTS, np.float32) + number,
                score,
                embedding,
                Image.new("RGB", (300 + number, 300)),
            )
            for number, (embedding, side, score) in enumerate(zip(embeddings, sides, scores))
        ]
        self.photos = [np.full((2, 2), number, np.uint8) for number in range(len(embeddings))]

    def face(self, source, pick="largest") -> Face:
        return self.faces[int(np.asarray(source)[0, 0])]

    def face_of_each(self, sources, pick="largest") -> list[Face]:
        return [self.face(source, pick) for source in sources]


def _around(seed: int, noise: float, count: int) -> list[np.ndarray]:
    """Raw embeddings of one person: `noise` 1 means a cosine of about .7 to the centre, .5 to each other."""
    centre = vector(seed, 1.0)
    rows = [centre + noise * vector(1000 * seed + number + 1, 1.0) for number in range(count)]
    return [(row / np.linalg.norm(row) * (18 + number)).astype(np.float32) for number, row in enumerate(rows)]


def test_one_photo_gives_its_raw_embedding_unchanged():
    prepared = _Extractor([vector(3)])
    ada = Identity.from_photos(prepared.photos[0], prepared, name="Ada")
    np.testing.assert_array_equal(ada.embedding, vector(3))
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
    centre = vector(9, 1.0)
    prepared = _Extractor(_around(9, 1.0, 6))
    ada = Identity.from_photos(prepared.photos, prepared)
    assert ada.normed @ centre > max(face.normed @ centre for face in prepared.faces) + 0.1


def test_one_poor_photo_moves_the_robust_mean_less_than_the_plain_one():
    centre, poor = vector(9, 1.0), vector(77, 1.0)
    rows = np.stack([*(row / np.linalg.norm(row) for row in _around(9, 0.4, 4)), 0.3 * centre + poor])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    plain = rows.mean(0) / np.linalg.norm(rows.mean(0))
    robust = robust_mean(rows.astype(np.float64))
    assert abs(robust @ poor) < abs(plain @ poor) and robust @ centre > plain @ centre


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_a_stranger_among_the_photos_is_named_and_left_out(order, tmp_path):
    prepared = _Extractor([*_around(5, 0.6, 3), vector(99)])
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


@pytest.mark.parametrize(
    ("sides", "scores", "best"),
    [([60, 200, 80], [0.9, 0.3, 0.9], 2), ([300, 400, 600], [0.7, 0.9, 0.8], 1)],
    ids=["surer", "beyond the crop's pixels size does not count"],
)
def test_a_sure_face_is_better_than_a_large_one(sides, scores, best):
    prepared = _Extractor(_around(5, 0.6, 3), sides, scores)
    np.testing.assert_array_equal(
        Identity.from_photos(prepared.photos, prepared).keypoints, np.array(POINTS, np.float32) + best
    )


def test_of_two_equal_faces_the_order_does_not_decide():
    prepared = _Extractor([vector(3), vector(3)], [300, 400])
    assert Identity.from_photos(prepared.photos, prepared) == Identity.from_photos(prepared.photos[::-1], prepared)


@pytest.mark.parametrize(("cosine", "same"), [(0.25, True), (0.15, False)])
def test_two_photos_as_unlike_as_hard_ones_are_one_person_and_less_alike_are_two(cosine, same):
    one, across = vector(1, 1.0), vector(2, 1.0)
    across = across - (across @ one) * one
    other = cosine * one + (1 - cosine**2) ** 0.5 * across / np.linalg.norm(across)
    prepared = _Extractor([one, other.astype(np.float32)])
    if same:
        assert Identity.from_photos(prepared.photos, prepared).normed @ one > 0.7
        return
    with pytest.raises(BadRequest, match="different people"):
        Identity.from_photos(prepared.photos, prepared)


def test_an_embedding_of_zeros_is_nobodys():
    prepared = _Extractor([vector(1), np.zeros(512, np.float32)])
    with pytest.raises(BadRequest, match="nobody's face"):
        Identity.from_photos(prepared.photos, prepared)


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
        Identity(vector(0)).aligned_crop(224)


def test_a_crop_of_the_asked_size_is_handed_on_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    assert Identity(vector(0), crop=pixels[:100]).aligned_crop(224).size == (224, 100), "not square: not aligned by us"
    assert np.array_equal(np.asarray(Identity(vector(0), crop=pixels).aligned_crop(224)), pixels)


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
