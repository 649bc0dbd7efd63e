"""Faces: insightface's real code path on tiny ONNX models, with every retry and way to pick a face, and the command."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idgen.detection import _cut
from idgen.errors import BadImage, BadRequest, BadWeights, NoFaceFound
from idgen.faces import Face, FaceExtractor
from tests.facepacks import FACE, PEOPLE, POINTS, group, pack, photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("packs") / "tiny")


@pytest.fixture(scope="module")
def extractor(folder) -> FaceExtractor:
    return FaceExtractor(folder, device="cpu")


@pytest.fixture(scope="module")
def fixed(tmp_path_factory) -> FaceExtractor:
    return FaceExtractor(pack(tmp_path_factory.mktemp("packs") / "fixed", size=128), device="cpu")


def test_a_face_comes_with_box_keypoints_score_and_raw_embedding(extractor):
    face = extractor.face(photo((640, 480), magenta=FACE))
    box = np.array(FACE, np.float32)
    assert face.box.dtype == face.keypoints.dtype == face.embedding.dtype == np.float32
    np.testing.assert_allclose(face.box, box, atol=0.6)
    np.testing.assert_allclose(face.keypoints, box[:2] + POINTS * (box[2:] - box[:2]), atol=0.6)
    assert face.score == pytest.approx(0.9) and face.embedding.shape == (512,)
    assert np.linalg.norm(face.embedding) > 5, "raw, not normalised"
    assert np.linalg.norm(face.normed) == pytest.approx(1, abs=1e-6)


def test_faces_are_sorted_largest_first_and_can_be_picked_by_index_or_point(extractor):
    faces = extractor.faces(group())
    assert [round(float(face.box[0])) for face in faces] == [400, 100, 300]
    for pick, left in (("largest", 400), (0, 400), (1, 100), (np.int64(2), 300), ((325, 80), 300), ((110, 110), 100)):
        assert round(float(extractor.face(group(), pick).box[0])) == left


def test_where_boxes_overlap_a_point_picks_the_face_whose_centre_is_nearer(extractor):
    both = photo((640, 480), yellow=(100, 100, 400, 400), magenta=(280, 280, 400, 400))
    assert round(float(extractor.face(both, (300, 300)).box[0])) == 280


@pytest.mark.parametrize(("pick", "words"), [(3, "no face 3"), ((5, 5), "(325, 85)")])
def test_a_pick_that_hits_no_face_says_what_there_is(extractor, pick, words):
    with pytest.raises(NoFaceFound) as caught:
        extractor.face(group(), pick)
    assert words in str(caught.value)


@pytest.mark.parametrize("pick", ["smallest", -1, 1.5, None, True, (1,), (1, 2, 3), (float("nan"), 1), ("a", "b")])
def test_a_pick_that_makes_no_sense_is_refused_by_name(extractor, pick):
    with pytest.raises(BadRequest) as caught:
        extractor.face(group(), pick)
    assert caught.value.field == "pick"


@pytest.mark.parametrize("size", [112, 224, 256])
def test_crops_have_the_geometry_of_insightfaces_norm_crop(extractor, size):
    from insightface.utils import face_align

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    generator = np.random.default_rng(size)
    for _ in range(20):  # turned, mirrored, skewed and half outside
        points = (POINTS @ generator.normal(size=(2, 2)) * 200 + generator.uniform(0, 400, 2)).astype(np.float32)
        face = Face(np.zeros(4, np.float32), points, 1.0, np.ones(512, np.float32), noise)
        expected = face_align.norm_crop(np.asarray(noise), points, size).astype(int)
        difference = np.abs(np.asarray(face.crop(size)).astype(int) - expected)
        assert face.crop(size).mode == "RGB" and np.mean(difference > 0) < 0.02 and np.mean(difference > 8) < 0.002


def test_cropping_warns_of_nothing(extractor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor.faces(photo((300, 300), cyan=(20, 30, 90, 110)))[0].crop(224)


def test_a_crop_of_another_size_is_refused(extractor):
    with pytest.raises(BadRequest, match="112, 224, 256"):
        extractor.face(group()).crop(128)


def test_the_embedding_is_what_insightface_computes_itself(folder, extractor):
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(name=str(folder), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=0, det_size=(640, 640))
    bgr = np.ascontiguousarray(np.asarray(group())[:, :, ::-1])
    theirs = sorted(app.get(bgr), key=lambda face: -(face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1]))
    ours = extractor.faces(group())
    assert len(theirs) == len(ours) == 3
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one.box, other.bbox, atol=1e-3)
        assert one.score == pytest.approx(float(other.det_score), abs=1e-6), "each colour has a score of its own"
        np.testing.assert_allclose(one.embedding, other.embedding, rtol=1e-3, atol=1e-2)


def test_embed_takes_an_aligned_rgb_crop_and_nothing_else(extractor):
    face = extractor.face(group())
    assert np.array_equal(extractor.embed(face.crop(112)), face.embedding)
    assert np.array_equal(extractor.embed(np.asarray(face.crop(112))), face.embedding)
    for wrong in (face.crop(224), np.zeros((112, 112, 3), np.float32), np.zeros((112, 112), np.uint8)):
        with pytest.raises(BadRequest):
            extractor.embed(wrong)


def test_a_recogniser_that_returns_no_numbers_is_bad_weights(extractor, monkeypatch):
    crop = extractor.face(group()).crop(112)
    monkeypatch.setattr(extractor._model, "get_feat", lambda crops: np.full((len(crops), 512), np.nan, np.float32))
    with pytest.raises(BadWeights, match="not 512 finite numbers"):
        extractor.embed(crop)


# Retries: what the tiny detector misses at its first look, `tests.facepacks` says.


def _found(extractor: FaceExtractor, size: tuple[int, int], box: tuple[int, int, int, int], tolerance: float) -> None:
    face = extractor.face(photo(size, magenta=box))
    np.testing.assert_allclose(face.box, box, atol=tolerance)
    corner, sides = np.array(box[:2]), np.array(box[2:]) - box[:2]
    np.testing.assert_allclose(face.keypoints, corner + POINTS * sides, atol=tolerance)


def test_a_face_that_is_too_large_for_the_first_look_is_found_with_a_smaller_size(extractor, monkeypatch):
    sizes, inner = [], extractor.detector._look
    monkeypatch.setattr(
        extractor.detector, "_look", lambda pixels, size, where: sizes.append(size) or inner(pixels, size, where)
    )
    _found(extractor, (800, 800), (100, 100, 700, 500), 4)
    assert sizes == [640, 320]


def test_a_face_that_is_too_small_for_the_first_look_is_found_with_a_larger_size(extractor):
    _found(extractor, (1600, 1200), (700, 500, 732, 540), 2)


@pytest.mark.parametrize("size", [(240, 240), (700, 500), (120, 400), (2600, 3000)])
def test_a_tight_crop_is_found_with_a_border_around_it_and_the_box_is_in_the_photos_pixels(extractor, size):
    width, height = size
    _found(extractor, size, (0, 0, width, height), max(3.0, 0.012 * max(size)))


def test_the_border_around_a_huge_photo_does_not_take_gigabytes():
    pixels = np.zeros((3000, 9000, 3), np.uint8)
    picture, shrunk = _cut(pixels, (-9000, -9000, 18_000, 12_000), 2560)
    assert shrunk == 10 and picture.shape == (2100, 2700, 3)
    whole, shrunk = _cut(pixels, (0, 0, 9000, 3000), 2560)
    assert shrunk == 1 and whole.shape == pixels.shape, "insightface itself scales a photo without a border"


def test_a_detector_of_fixed_size_works_and_looks_closer_at_quarters(fixed):
    assert fixed.face(photo((128, 128), magenta=(40, 30, 90, 100))).box == pytest.approx([40, 30, 90, 100], abs=0.6)
    _found(fixed, (1000, 800), (250, 200, 500, 550), 8)
    _found(fixed, (100, 100), (0, 0, 100, 100), 4)
    _found(fixed, (512, 512), (300, 300, 345, 360), 4)
    _found(fixed, (512, 512), (230, 230, 282, 282), 4)  # in the middle, where all four corners' quarters would cut it


def test_at_quarters_each_face_is_reported_once_and_none_cut_in_half(fixed):
    crowd = photo((512, 512), magenta=(150, 150, 210, 210), cyan=(300, 300, 350, 350))
    assert [tuple(np.round(face.box / 8) * 8) for face in fixed.faces(crowd)] == [
        (152, 152, 208, 208),
        (304, 304, 352, 352),
    ]


@pytest.mark.parametrize(
    ("box", "points", "found"),
    [
        ((10, 10, 50, 60), POINTS * 40 + 10, 1),
        ((10, 10, 50, 60), np.full((5, 2), 30), 0),
        ((10, 10, 50, 60), np.full((5, 2), np.nan), 0),
        ((np.nan, 10, 50, 60), POINTS * 40 + 10, 0),
        ((-90, 10, 40, 60), POINTS * 40 + 10, 0),
        ((10, 60, 50, 160), POINTS * 40 + 10, 0),
        ((50, 60, 10, 10), POINTS * 40 + 10, 0),
    ],
    ids=["a face", "one point", "no numbers", "no box", "left of the photo", "below the photo", "nothing inside"],
)
def test_what_the_detector_cannot_mean_is_no_face(extractor, monkeypatch, box, points, found):
    answer = np.array([[*box, 0.9]], np.float32), np.array([points], np.float32)
    monkeypatch.setattr(extractor.detector._scrfd, "detect", lambda *_, **__: tuple(part.copy() for part in answer))
    assert len(extractor.detector._look(np.zeros((100, 100, 3), np.uint8), 640, [(0, 0, 100, 100)])) == found


@pytest.mark.parametrize("size", [(640, 480), (30, 20), (1, 1), (5000, 3), (3, 9000)])
def test_without_a_face_the_error_names_the_photo_what_was_tried_and_the_cure(extractor, fixed, size, tmp_path):
    file = tmp_path / "landscape.png"
    Image.new("RGB", size, (90, 90, 90)).save(file)
    for each in (extractor, fixed):
        with pytest.raises(NoFaceFound) as caught:
            each.face(file)
        for words in ("landscape.png", "640" if each is extractor else "128", "25%, 50%, 100%", "Use a photo"):
            assert words in str(caught.value)


def test_photos_are_read_with_the_same_distrust_as_everywhere(extractor, tmp_path):
    with pytest.raises(BadImage, match=r"nobody\.png"):
        extractor.face(tmp_path / "nobody.png")


@pytest.fixture(scope="module")
def command():
    import typer

    from idgen.cli.faces import faces

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(faces)
    return app


def _run(command, *arguments):
    from typer.testing import CliRunner

    return CliRunner().invoke(command, [str(each) for each in arguments])


def test_the_command_lists_faces_and_draws_them(command, folder, tmp_path):
    group().save(tmp_path / "group.png")
    result = _run(command, tmp_path / "group.png", "--pack", folder, "--draw", tmp_path / "new" / "out.png")
    assert result.exit_code == 0 and "3 face(s)" in result.stdout
    assert Image.open(tmp_path / "new" / "out.png").size == (640, 480)


def test_the_command_prints_pure_json_and_tells_bad_photos_by_exit_code_2(command, folder, tmp_path):
    group().save(tmp_path / "group.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "nobody.png")
    files = [tmp_path / "group.png", tmp_path / "nobody.png", tmp_path / "missing.png"]
    result = _run(command, *files, "--pack", folder, "--json", "--draw", tmp_path / "drawn")
    assert result.exit_code == 2
    three, nobody, missing = json.loads(result.stdout)
    assert [face["index"] for face in three["faces"]] == [0, 1, 2] and three["recogniser"] == "rec"
    assert len(three["faces"][0]["keypoints"]) == 5 and "error" not in three
    assert "no face" in nobody["error"] and "no such file" in missing["error"]
    assert (tmp_path / "drawn" / "group-faces.png").is_file()


def test_drawing_several_photos_into_one_file_is_refused(command, folder, tmp_path):
    group().save(tmp_path / "a.png")
    result = _run(command, tmp_path / "a.png", tmp_path / "a.png", "--pack", folder, "--draw", tmp_path / "out.png")
    assert isinstance(result.exception, BadRequest) and result.exception.field == "draw"


def test_the_three_people_of_these_tests_differ(extractor):
    one, two, three = (face.normed for face in extractor.faces(group()))
    assert len(PEOPLE) == 3 and max(one @ two, one @ three, two @ three) < 0.2
