"""Faces of many photos and of one photo many times: each is searched once, also by many threads, and remembered."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idgen import faces as faces_module
from idgen.errors import BadImage, BadRequest, BadWeights, NoFaceFound
from idgen.faces import FaceExtractor
from tests.facepacks import detector, group, pack, photo, recogniser


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("packs") / "tiny")


@pytest.fixture(scope="module")
def extractor(folder) -> FaceExtractor:
    return FaceExtractor(folder, device="cpu")


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
    first = extractor.face(group())
    for part in (first.embedding, first.box, first.keypoints):
        part[:] = 0
    again = extractor.face(group())
    assert np.linalg.norm(again.embedding) > 5 and again.box[2] > 0 and again.keypoints.min() > 0


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

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(12)]
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
            extractor.face(group())
    assert extractor.face(group()).score > 0.5


def _many(tmp_path: Path) -> list:
    photo((300, 200), cyan=(20, 30, 90, 110)).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    nobody = Image.new("RGB", (64, 64))
    single = [photo((64, 64), magenta=(16, 16, 40, 48 - step)) for step in range(20)]
    return [group(), tmp_path / "a.png", tmp_path / "b.jpg", nobody, *single, group(), tmp_path / "missing.png"]


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
    extractor.faces(group())
    list(extractor.extract_many(_many(tmp_path)))
    assert counter.calls == 23


def test_many_photos_are_looked_at_several_at_once(folder, monkeypatch):
    extractor = FaceExtractor(folder, device="cpu")
    inner, two = extractor.detector.detect, threading.Barrier(2, timeout=30)

    def together(pixels):
        two.wait()
        return inner(pixels)

    monkeypatch.setattr(extractor.detector, "detect", together)
    monkeypatch.setattr(faces_module, "_cores", lambda: 2)
    pictures = [photo((64, 64), magenta=(16, 16, 40, 48 - step)) for step in range(4)]
    assert [len(found) for found in extractor.extract_many(pictures)] == [1] * 4


def test_many_crops_are_recognised_in_one_run_where_the_batch_axis_is_free(folder, monkeypatch):
    extractor = FaceExtractor(folder, device="cpu")
    crops = [face.crop(112) for face in extractor.faces(group())]
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
    (found,) = extractor.extract_many([group()])
    alone = FaceExtractor(tmp_path / "pack", device="cpu").faces(group())
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
    pictures = [photo((64, 64), magenta=(16, 16, 40, 48)), group()]
    for part, name in ((extractor.detector, "detect"), (extractor, "embed_many")):
        with monkeypatch.context() as broken:
            broken.setattr(part, name, lambda given: (_ for _ in ()).throw(BadWeights("for once")))
            with pytest.raises(BadWeights):
                list(extractor.extract_many(pictures))
    assert [len(found) for found in extractor.extract_many(pictures)] == [1, 3]


def test_a_photo_that_is_opened_after_another_has_failed_is_not_waited_for_forever(folder, monkeypatch):
    extractor = FaceExtractor(folder, device="cpu")
    failing, late = photo((64, 64), magenta=(16, 16, 40, 48)), group()
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


def test_a_photo_that_is_looked_at_when_no_further_thread_starts_is_not_waited_for_forever(folder, monkeypatch):
    extractor = FaceExtractor(folder, device="cpu")
    pictures, begun = [group(), photo((64, 64), magenta=(16, 16, 40, 48))], threading.Event()
    claim, submit = extractor._claim, ThreadPoolExecutor.submit

    def claimed(picture: Image.Image):
        begun.set()
        return claim(picture)

    def scarce(pool: ThreadPoolExecutor, *work):
        if begun.is_set():
            raise RuntimeError("can't start new thread")
        started = submit(pool, *work)
        assert begun.wait(30)
        return started

    with monkeypatch.context() as broken:
        broken.setattr(extractor, "_claim", claimed)
        broken.setattr(ThreadPoolExecutor, "submit", scarce)
        with pytest.raises(RuntimeError, match="new thread"):
            list(extractor.extract_many(pictures))
    results = []
    again = threading.Thread(target=lambda: results.extend(extractor.extract_many(pictures)), daemon=True)
    again.start()
    again.join(60)
    assert [len(found) for found in results] == [3, 1]


def test_one_face_of_each_photo_is_picked_as_from_each_alone(extractor):
    pictures = [group(), photo((640, 480), cyan=(300, 50, 350, 120))]
    faces = extractor.face_of_each(pictures, (325, 80))
    assert [face.box[0] for face in faces] == [extractor.face(each, (325, 80)).box[0] for each in pictures]
    with pytest.raises(NoFaceFound, match=r"1 face\(s\)"):
        extractor.face_of_each(pictures, 2)
    with pytest.raises(BadRequest):
        extractor.face_of_each(pictures, "smallest")
