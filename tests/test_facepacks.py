"""Face packs: every layout on disk, what is no pack, options, and the processor that does the work."""

from __future__ import annotations

import sys
import threading
import warnings
from pathlib import Path

import pytest

from idgen import facepacks as loading
from idgen.errors import BadRequest, BadWeights, WeightsMissing
from idgen.faces import FaceExtractor
from tests.facepacks import detector, group, pack, photo, recogniser


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("packs") / "tiny")


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
    assert nested.face(group()).score > 0.5 and sorted(tmp_path.rglob("*")) == before


def test_two_recognisers_side_by_side_are_an_error_that_names_both(tmp_path):
    folder = pack(tmp_path / "pack")
    recogniser(folder / "arcface.onnx", seed=1)
    with pytest.raises(BadWeights) as caught:
        FaceExtractor(folder, device="cpu")
    assert "arcface.onnx" in str(caught.value) and "rec.onnx" in str(caught.value)


def test_the_landmark_models_beside_a_recogniser_are_none(tmp_path):
    folder = pack(tmp_path / "pack")
    recogniser(folder / "2d106det.onnx", outputs=212, side=192)
    assert FaceExtractor(folder, device="cpu").recogniser == folder / "rec.onnx"


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
    one, two, three = (each.face(group()).normed for each in extractors)
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
    assert sizes[0] == 320 and small.face(group()).score > 0.5


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
    assert first.providers == ["CPUExecutionProvider"] and first.face(group()).score > 0.5


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
        both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: both)
        for asked in ("cpu", "mps"):
            loading.warn_of_cpu(asked, ["CPUExecutionProvider"])


def test_nothing_is_printed_while_loading_and_looking(folder, capfd, monkeypatch):
    import insightface.app

    inner = insightface.app.FaceAnalysis

    def talkative(*arguments, **options):
        print("find model: det.onnx")  # as insightface did before it learnt to log
        return inner(*arguments, **options)

    monkeypatch.setattr(insightface.app, "FaceAnalysis", talkative)
    FaceExtractor(folder, device="cpu").face(group())
    assert capfd.readouterr().out == ""
