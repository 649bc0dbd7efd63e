"""Faces: insightface's real code path on tiny ONNX models, with every layout, retry and way to pick a face."""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idgen import facepacks as loading
from idgen import faces as faces_module
from idgen.detection import _cut
from idgen.errors import BadImage, BadRequest, BadWeights, NoFaceFound, WeightsMissing
from idgen.faces import Face, FaceExtractor
from tests.facepacks import PEOPLE, POINTS, detector, pack, photo, recogniser

FACE = (100, 100, 220, 260)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("packs") / "tiny")


@pytest.fixture(scope="module")
def extractor(folder) -> FaceExtractor:
    return FaceExtractor(folder, device="cpu")


@pytest.fixture(scope="module")
def fixed(tmp_path_factory) -> FaceExtractor:
    return FaceExtractor(pack(tmp_path_factory.mktemp("packs") / "fixed", size=128), device="cpu")


def _group() -> Image.Image:
    return photo((640, 480), magenta=FACE, cyan=(300, 50, 350, 120), yellow=(400, 200, 600, 420))


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
    faces = extractor.faces(_group())
    assert [round(float(face.box[0])) for face in faces] == [400, 100, 300]
    for pick, left in (("largest", 400), (0, 400), (1, 100), (np.int64(2), 300), ((325, 80), 300), ((110, 110), 100)):
        assert round(float(extractor.face(_group(), pick).box[0])) == left


def test_where_boxes_overlap_a_point_picks_the_face_whose_centre_is_nearer(extractor):
    both = photo((640, 480), yellow=(100, 100, 400, 400), magenta=(280, 280, 400, 400))
    assert round(float(extractor.face(both, (300, 300)).box[0])) == 280


@pytest.mark.parametrize(("pick", "words"), [(3, "no face 3"), ((5, 5), "(325, 85)")])
def test_a_pick_that_hits_no_face_says_what_there_is(extractor, pick, words):
    with pytest.raises(NoFaceFound) as caught:
        extractor.face(_group(), pick)
    assert words in str(caught.value)


@pytest.mark.parametrize("pick", ["smallest", -1, 1.5, None, True, (1,), (1, 2, 3), (float("nan"), 1), ("a", "b")])
def test_a_pick_that_makes_no_sense_is_refused_by_name(extractor, pick):
    with pytest.raises(BadRequest) as caught:
        extractor.face(_group(), pick)
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
        extractor.face(_group()).crop(128)


def test_the_embedding_is_what_insightface_computes_itself(folder, extractor):
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(name=str(folder), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=0, det_size=(640, 640))
    bgr = np.ascontiguousarray(np.asarray(_group())[:, :, ::-1])
    theirs = sorted(app.get(bgr), key=lambda face: -(face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1]))
    ours = extractor.faces(_group())
    assert len(theirs) == len(ours) == 3
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one.box, other.bbox, atol=1e-3)
        assert one.score == pytest.approx(float(other.det_score), abs=1e-6), "each colour has a score of its own"
        np.testing.assert_allclose(one.embedding, other.embedding, rtol=1e-3, atol=1e-2)


def test_embed_takes_an_aligned_rgb_crop_and_nothing_else(extractor):
    face = extractor.face(_group())
    assert np.array_equal(extractor.embed(face.crop(112)), face.embedding)
    assert np.array_equal(extractor.embed(np.asarray(face.crop(112))), face.embedding)
    for wrong in (face.crop(224), np.zeros((112, 112, 3), np.float32), np.zeros((112, 112), np.uint8)):
        with pytest.raises(BadRequest):
            extractor.embed(wrong)


# Retries. The tiny detector misses faces below 16 and above 400 pixels at its input and those that fill 60 % of it.


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


@pytest.mark.parametrize("size", [(640, 480), (30, 20), (1, 1), (5000, 3), (3, 9000)])
def test_without_a_face_the_error_names_the_photo_what_was_tried_and_the_cure(extractor, fixed, size, tmp_path):
    file = tmp_path / "landscape.png"
    Image.new("RGB", size, (90, 90, 90)).save(file)
    for each in (extractor, fixed):
        with pytest.raises(NoFaceFound) as caught:
            each.face(file)
        for words in ("landscape.png", "640" if each is extractor else "128", "50%", "Use a photo"):
            assert words in str(caught.value)


def test_photos_are_read_with_the_same_distrust_as_everywhere(extractor, tmp_path):
    with pytest.raises(BadImage, match=r"nobody\.png"):
        extractor.face(tmp_path / "nobody.png")


# Caching.


class _Counter:
    def __init__(self, extractor: FaceExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        inner = extractor.detector.detect

        def counted(pixels):
            self.calls += 1
            return inner(pixels)

        monkeypatch.setattr(extractor.detector, "detect", counted)


def test_a_thousand_uses_of_one_photo_extract_once(folder, monkeypatch, tmp_path):
    extractor = FaceExtractor(folder, device="cpu")
    counter = _Counter(extractor, monkeypatch)
    picture = photo((64, 64), magenta=(16, 16, 40, 48))
    picture.save(tmp_path / "a.png")
    faces = [
        extractor.face(source) for source in (picture, np.asarray(picture), tmp_path / "a.png") for _ in range(334)
    ]
    assert counter.calls == 1
    assert all(np.array_equal(face.embedding, faces[0].embedding) for face in faces)
    extractor.face(photo((64, 64), magenta=(16, 16, 40, 47)))
    assert counter.calls == 2, "another photo is another extraction"


def test_what_a_caller_does_to_a_face_does_not_reach_the_cache(extractor):
    first = extractor.face(_group())
    first.embedding[:] = 0
    first.box[:] = 0
    assert np.linalg.norm(extractor.face(_group()).embedding) > 5 and extractor.face(_group()).box[2] > 0


def test_a_photo_without_a_face_is_searched_once_too(folder, monkeypatch):
    extractor = FaceExtractor(folder, device="cpu")
    counter = _Counter(extractor, monkeypatch)
    for _ in range(3):
        with pytest.raises(NoFaceFound):
            extractor.faces(Image.new("RGB", (64, 64)))
    assert counter.calls == 1


def test_the_cache_forgets_the_photo_that_was_used_longest_ago(folder, monkeypatch):
    extractor = FaceExtractor(folder, device="cpu", cache_size=2)
    counter = _Counter(extractor, monkeypatch)
    one, two, three = (photo((64, 64), magenta=(16, 16, 40, right)) for right in (40, 44, 48))
    for picture in (one, two, one, three, one):
        extractor.face(picture)
    assert counter.calls == 3
    extractor.face(two)
    assert counter.calls == 4 and len(extractor._cache) == 2


def test_many_threads_asking_for_one_photo_extract_once_and_agree(folder, monkeypatch):
    extractor = FaceExtractor(folder, device="cpu")
    counter = _Counter(extractor, monkeypatch)
    pictures = [photo((200, 200), magenta=(20, 20, 80, 90 + step)) for step in range(3)]
    barrier, results = threading.Barrier(12), {}

    def work(number: int) -> None:
        barrier.wait()
        results[number] = extractor.face(pictures[number % 3]).embedding

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.calls == 3
    assert all(np.array_equal(results[number], results[number % 3]) for number in range(12))


def test_a_failure_is_not_remembered(folder, monkeypatch):
    extractor = FaceExtractor(folder, device="cpu")
    with monkeypatch.context() as broken:
        broken.setattr(extractor.detector, "detect", lambda pixels: (_ for _ in ()).throw(BadWeights("for once")))
        with pytest.raises(BadWeights):
            extractor.face(_group())
    assert extractor.face(_group()).score > 0.5


# Many photos.


def _many(tmp_path: Path) -> list:
    photo((300, 200), cyan=(20, 30, 90, 110)).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    nobody = Image.new("RGB", (64, 64))
    single = [photo((64, 64), magenta=(16, 16, 40, 48 - step)) for step in range(20)]
    return [_group(), tmp_path / "a.png", tmp_path / "b.jpg", nobody, *single, _group(), tmp_path / "missing.png"]


def test_many_photos_give_what_each_gives_alone_in_their_order_and_bad_ones_their_error(folder, extractor, tmp_path):
    photos = _many(tmp_path)
    found = list(FaceExtractor(folder, device="cpu").extract_many(photos))
    assert len(found) == len(photos)
    for each, source in zip(found, photos):
        try:
            alone = extractor.faces(source)
        except (BadImage, NoFaceFound) as error:
            assert type(each) is type(error) and str(each) == str(error)
            continue
        assert len(each) == len(alone)
        for one, other in zip(each, alone):
            assert np.array_equal(one.box, other.box) and np.array_equal(one.keypoints, other.keypoints)
            assert one.score == other.score and one.photo.size == other.photo.size
            np.testing.assert_allclose(one.embedding, other.embedding, rtol=1e-5, atol=1e-5)


def test_many_photos_are_searched_once_each_and_remembered(folder, monkeypatch, tmp_path):
    extractor = FaceExtractor(folder, device="cpu")
    counter = _Counter(extractor, monkeypatch)
    list(extractor.extract_many(_many(tmp_path)))
    assert counter.calls == 23, "26 photos, of which two cannot be read and one comes twice"
    extractor.faces(_group())
    list(extractor.extract_many(_many(tmp_path)))
    assert counter.calls == 23


def test_many_crops_are_recognised_in_one_run_where_the_batch_axis_is_free(folder, monkeypatch):
    extractor = FaceExtractor(folder, device="cpu")
    crops = [face.crop(112) for face in extractor.faces(_group())]
    runs, inner = [], extractor._model.get_feat
    monkeypatch.setattr(extractor._model, "get_feat", lambda rows: runs.append(len(rows)) or inner(rows))
    together = extractor.embed_many(crops * 6)
    assert runs == [16, 2] and together.shape == (18, 512) and together.dtype == np.float32
    alone = np.stack([extractor.embed(crop) for crop in crops])
    np.testing.assert_allclose(together, np.tile(alone, (6, 1)), rtol=1e-5, atol=1e-5)
    assert extractor.embed_many([]).shape == (0, 512)


@pytest.mark.parametrize("batch", [1, "n"])
def test_a_recogniser_made_for_one_crop_sees_one_at_a_time(tmp_path, batch):
    """Also one whose batch axis is free by name only, as some exports are."""
    detector(tmp_path / "pack" / "det.onnx")
    recogniser(tmp_path / "pack" / "rec.onnx", batch=batch, reshape=True)
    extractor = FaceExtractor(tmp_path / "pack", device="cpu")
    (found,) = extractor.extract_many([_group()])
    alone = FaceExtractor(tmp_path / "pack", device="cpu").faces(_group())
    assert len(alone) == 3
    assert all(np.array_equal(one.embedding, other.embedding) for one, other in zip(found, alone))


def test_threads_with_many_photos_in_opposite_order_neither_wait_forever_nor_search_twice(folder, monkeypatch):
    extractor = FaceExtractor(folder, device="cpu")
    counter = _Counter(extractor, monkeypatch)
    pictures = [photo((200, 200), magenta=(20, 20, 80, 90 + step)) for step in range(20)]
    results = {}

    def work(order: int) -> None:
        results[order] = [found[0].embedding for found in extractor.extract_many(pictures[::order])][::order]

    threads = [threading.Thread(target=work, args=(order,), daemon=True) for order in (1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counter.calls == 20 and len(results) == 2
    assert all(np.array_equal(one, other) for one, other in zip(results[1], results[-1]))


def test_a_model_that_fails_on_many_photos_is_tried_again_the_next_time(folder, monkeypatch):
    extractor = FaceExtractor(folder, device="cpu")
    pictures = [photo((64, 64), magenta=(16, 16, 40, 48)), _group()]
    for part, name in ((extractor.detector, "detect"), (extractor, "embed_many")):
        with monkeypatch.context() as broken:
            broken.setattr(part, name, lambda given: (_ for _ in ()).throw(BadWeights("for once")))
            with pytest.raises(BadWeights):
                list(extractor.extract_many(pictures))
    assert [len(found) for found in extractor.extract_many(pictures)] == [1, 3]


def test_a_photo_that_is_opened_after_another_has_failed_is_not_waited_for_forever(folder, monkeypatch):
    extractor = FaceExtractor(folder, device="cpu")
    failing, late = photo((64, 64), magenta=(16, 16, 40, 48)), _group()
    failed, opened = threading.Event(), faces_module.open_photo

    def fail(pixels: np.ndarray) -> None:
        failed.set()
        raise BadWeights("for once")

    def open_late(source: Image.Image) -> Image.Image:
        if source is late and failed.wait(10):
            time.sleep(0.2)
        return opened(source)

    with monkeypatch.context() as broken:
        broken.setattr(extractor.detector, "detect", fail)
        broken.setattr(faces_module, "open_photo", open_late)
        with pytest.raises(BadWeights):
            list(extractor.extract_many([failing, late]))
    results = []
    again = threading.Thread(target=lambda: results.extend(extractor.extract_many([failing, late])), daemon=True)
    again.start()
    again.join(60)
    assert [len(found) for found in results] == [1, 3]


def test_one_face_of_each_photo_is_picked_as_from_each_alone(extractor):
    pictures = [_group(), photo((640, 480), cyan=(300, 50, 350, 120))]
    faces = extractor.face_of_each(pictures, (325, 80))
    assert [face.box[0] for face in faces] == [extractor.face(each, (325, 80)).box[0] for each in pictures]
    with pytest.raises(NoFaceFound, match=r"1 face\(s\)"):
        extractor.face_of_each(pictures, 2)
    with pytest.raises(BadRequest):
        extractor.face_of_each(pictures, "smallest")


# Packs on disk.


def _sizes(extractor: FaceExtractor, side: int) -> list[int]:
    return list(dict.fromkeys(size for size, _ in extractor.detector._looks(side, side)))


def test_a_pack_may_limit_how_much_small_photos_are_enlarged_and_a_caller_decides_otherwise(tmp_path):
    folder = pack(tmp_path / "pack")
    original = FaceExtractor(folder, device="cpu")
    assert [_sizes(original, side)[0] for side in (64, 128, 2000)] == [640] * 3, "what the original pipelines look with"
    (folder / "pack.toml").write_text("enlarge = 2\n")
    limited = FaceExtractor(folder, device="cpu")
    assert [_sizes(limited, side)[0] for side in (10, 100, 128, 300, 2000)] == [64, 224, 256, 608, 640]
    assert _sizes(limited, 2000) == _sizes(original, 2000)
    for side in (10, 100, 128, 300):
        assert 640 in _sizes(limited, side), "nothing is given up that was tried before"
    assert limited.face(photo((128, 128), magenta=(40, 30, 90, 100))).score > 0.5
    assert _sizes(FaceExtractor(folder, device="cpu", detection_size=320), 100)[0] == 320


@pytest.mark.parametrize("text", ["enlarge = 0", "size = 256", "enlarge = '2'", "enlarge = true", "no toml"])
def test_a_pack_file_that_makes_no_sense_is_bad_weights_and_named(tmp_path, text):
    folder = pack(tmp_path / "pack")
    (folder / "pack.toml").write_text(text)
    with pytest.raises(BadWeights, match=r"pack\.toml"):
        FaceExtractor(folder, device="cpu")


def test_the_nested_layout_of_antelopev2_is_understood_and_left_as_it_is(tmp_path):
    inner = pack(tmp_path / "antelopev2" / "antelopev2")
    before = sorted(tmp_path.rglob("*"))
    nested = FaceExtractor(tmp_path / "antelopev2", device="cpu")
    assert nested.pack == inner and nested.recogniser == inner / "rec.onnx"
    assert nested.face(_group()).score > 0.5 and sorted(tmp_path.rglob("*")) == before


def test_two_recognisers_side_by_side_are_an_error_that_names_both(tmp_path):
    folder = pack(tmp_path / "pack")
    recogniser(folder / "arcface.onnx", seed=1)
    with pytest.raises(BadWeights) as caught:
        FaceExtractor(folder, device="cpu")
    assert "arcface.onnx" in str(caught.value) and "rec.onnx" in str(caught.value)


def test_a_second_recogniser_outside_the_nested_folder_is_seen_too(tmp_path):
    pack(tmp_path / "antelopev2" / "antelopev2")
    recogniser(tmp_path / "antelopev2" / "arcface.onnx", seed=1)
    with pytest.raises(BadWeights, match=r"arcface\.onnx"):
        FaceExtractor(tmp_path / "antelopev2", device="cpu")


def test_the_recogniser_named_by_its_path_is_the_one_that_is_used(tmp_path):
    folder = pack(tmp_path / "pack")
    paths = [
        recogniser(folder / "a_first.onnx", seed=1),
        folder / "rec.onnx",
        recogniser(tmp_path / "far.onnx", seed=2),
    ]
    extractors = [FaceExtractor(folder, path, device="cpu") for path in paths]
    assert [each.recogniser_name for each in extractors] == ["a_first", "rec", "far"]
    one, two, three = (each.face(_group()).normed for each in extractors)
    assert max(abs(one @ two), abs(one @ three), abs(two @ three)) < 0.3


def test_several_packs_in_a_folder_are_an_error_that_names_them(tmp_path):
    pack(tmp_path / "antelopev2"), pack(tmp_path / "buffalo_l")
    with pytest.raises(BadWeights, match=r"antelopev2.*buffalo_l"):
        FaceExtractor(tmp_path, device="cpu")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_bytes(b"zip")])
def test_a_missing_pack_names_the_command_that_gets_it(tmp_path, make):
    make(tmp_path / "antelopev2")
    with pytest.raises(WeightsMissing, match="idgen weights pull"):
        FaceExtractor(tmp_path / "antelopev2", device="cpu")


def test_a_missing_recogniser_is_named(folder, tmp_path):
    with pytest.raises(WeightsMissing, match=r"arcface\.onnx"):
        FaceExtractor(folder, tmp_path / "arcface.onnx", device="cpu")


def _empty(folder: Path) -> None:
    folder.mkdir()


def _only_recogniser(folder: Path) -> None:
    recogniser(folder / "rec.onnx")


def _only_detector(folder: Path) -> None:
    detector(folder / "det.onnx")


def _truncated(folder: Path) -> None:
    pack(folder)
    (folder / "rec.onnx").write_bytes((folder / "rec.onnx").read_bytes()[:5000])


def _garbage(folder: Path) -> None:
    pack(folder)
    (folder / "det.onnx").write_bytes(b"\xff\xfe not a model")


def _pickle(folder: Path) -> None:
    pack(folder)
    (folder / "genderage.onnx").write_bytes(b"\x80\x04\x95cposix\nsystem\n")


def _wrong_width(folder: Path) -> None:
    pack(folder)
    recogniser(folder / "rec.onnx", outputs=256)


def _no_keypoints(folder: Path) -> None:
    pack(folder)
    detector(folder / "det.onnx", outputs=6)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_empty, "no .onnx file"),
        (_only_recogniser, "no face detector"),
        (_only_detector, "no recogniser"),
        (_truncated, "rec.onnx"),
        (_garbage, "det.onnx"),
        (_pickle, "genderage.onnx"),
        (_wrong_width, "not 512"),
        (_no_keypoints, "keypoints"),
    ],
)
def test_a_pack_that_is_not_what_it_claims_is_bad_weights_and_says_why(tmp_path, spoil, words):
    spoil(tmp_path / "pack")
    with pytest.raises(BadWeights) as caught:
        FaceExtractor(tmp_path / "pack", device="cpu")
    assert words in str(caught.value)


@pytest.mark.parametrize("wrong", ["det.onnx", "text.onnx"])
def test_a_recogniser_that_is_none_is_bad_weights(folder, tmp_path, wrong):
    file = folder / wrong if wrong == "det.onnx" else tmp_path / wrong
    if wrong == "text.onnx":
        file.write_text("this is no model")
    with pytest.raises(BadWeights, match=wrong):
        FaceExtractor(folder, file, device="cpu")


@pytest.mark.parametrize(
    "options", [{"device": "tpu"}, {"device": "cuda:x"}, {"detection_size": 100}, {"cache_size": 0}]
)
def test_options_out_of_their_bounds_are_refused_by_name(folder, options):
    with pytest.raises(BadRequest) as caught:
        FaceExtractor(folder, **options)
    assert caught.value.field == next(iter(options))


def test_another_detection_size_is_used_first(folder):
    small = FaceExtractor(folder, device="cpu", detection_size=320)
    sizes = [size for size, _ in small.detector._looks(1000, 1000)]
    assert sizes[0] == 320 and small.face(_group()).score > 0.5


# The processor that does the work.


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(loading, "_warned", threading.Event())


def test_asking_for_cuda_without_it_warns_once_with_the_cure_and_works_on_the_cpu(folder, unwarned, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.warns(RuntimeWarning, match="pip install onnxruntime-gpu"):
        first = FaceExtractor(folder, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FaceExtractor(folder, device="cuda:1")
    assert first.providers == ["CPUExecutionProvider"] and first.face(_group()).score > 0.5


def test_a_cuda_provider_that_did_not_load_is_told_apart(unwarned, monkeypatch):
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    assert loading.providers_for("auto")[0] == ("CUDAExecutionProvider", {"device_id": 0})
    assert loading.providers_for("cuda:3")[0] == ("CUDAExecutionProvider", {"device_id": 3})
    assert loading.providers_for("cpu") == loading.providers_for("mps") == ["CPUExecutionProvider"]
    with pytest.warns(RuntimeWarning, match="did not load"):
        loading.warn_of_cpu("auto", ["CPUExecutionProvider"])


def test_no_warning_where_the_cpu_is_all_there_is_or_was_asked_for(unwarned, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loading.warn_of_cpu("auto", ["CPUExecutionProvider"])
        loading.warn_of_cpu("cpu", ["CPUExecutionProvider"])
        loading.warn_of_cpu("cuda", ["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_nothing_is_printed_while_loading_and_looking(folder, capfd, monkeypatch):
    import insightface.app

    inner = insightface.app.FaceAnalysis

    def talkative(*arguments, **options):
        print("find model: det.onnx")  # as insightface did before it learnt to log
        return inner(*arguments, **options)

    monkeypatch.setattr(insightface.app, "FaceAnalysis", talkative)
    FaceExtractor(folder, device="cpu").face(_group())
    assert capfd.readouterr().out == ""


# The command.


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
    _group().save(tmp_path / "group.png")
    result = _run(command, tmp_path / "group.png", "--pack", folder, "--draw", tmp_path / "new" / "out.png")
    assert result.exit_code == 0 and "3 face(s)" in result.stdout
    assert Image.open(tmp_path / "new" / "out.png").size == (640, 480)


def test_the_command_prints_pure_json_and_tells_bad_photos_by_exit_code_2(command, folder, tmp_path):
    _group().save(tmp_path / "group.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "nobody.png")
    files = [tmp_path / "group.png", tmp_path / "nobody.png", tmp_path / "missing.png"]
    result = _run(command, *files, "--pack", folder, "--json", "--draw", tmp_path / "drawn")
    assert result.exit_code == 2
    group, nobody, missing = json.loads(result.stdout)
    assert [face["index"] for face in group["faces"]] == [0, 1, 2] and group["recogniser"] == "rec"
    assert len(group["faces"][0]["keypoints"]) == 5 and "error" not in group
    assert "no face" in nobody["error"] and "no such file" in missing["error"]
    assert (tmp_path / "drawn" / "group-faces.png").is_file()


def test_drawing_several_photos_into_one_file_is_refused(command, folder, tmp_path):
    _group().save(tmp_path / "a.png")
    result = _run(command, tmp_path / "a.png", tmp_path / "a.png", "--pack", folder, "--draw", tmp_path / "out.png")
    assert isinstance(result.exception, BadRequest) and result.exception.field == "draw"


def test_the_three_people_of_these_tests_differ(extractor):
    one, two, three = (face.normed for face in extractor.faces(_group()))
    assert len(PEOPLE) == 3 and max(one @ two, one @ three, two @ three) < 0.2
