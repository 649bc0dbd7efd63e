"""Combined methods that were trained on different recognisers: each reads the embedding of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import idgen
from idgen import api
from idgen.errors import BadRequest, WeightsMissing
from idgen.faces import FaceExtractor
from idgen.identity import Identity
from idgen.pipeline import Pipeline
from tests import facepacks, tiny

BOTH = "instantid+ip-adapter-faceid-plusv2"
PHOTO = facepacks.photo((128, 128), cyan=(32, 24, 96, 104))


def pack(folder: Path, name: str, seed: int) -> Path:
    facepacks.detector(folder / "det.onnx", 128)
    facepacks.recogniser(folder / f"{name}.onnx", seed)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Manifest entries that are here, by name."""
    entries = {
        "instantid": tiny.INSTANTID,
        "ip-adapter-faceid-plusv2_sdxl": tiny.FACEID,
        "clip-vit-h": tiny.ENCODER,
        "antelopev2": pack(tmp_path / "antelopev2", "glintr100", 1),
        "buffalo_l": pack(tmp_path / "buffalo_l", "w600k_r50", 2),
    }

    def locate(entry: str) -> Path:
        if entry not in entries:
            raise WeightsMissing(f"{entry} is not here: idgen weights pull {entry}")
        return entries[entry]

    monkeypatch.setattr(api, "locate", locate)
    monkeypatch.setattr(api, "_extractors", {})
    return entries


def load(name: str = BOTH) -> Pipeline:
    return idgen.load(name, base=tiny.backbone())


def by(entries: dict[str, Path], entry: str) -> np.ndarray:
    return FaceExtractor(entries[entry]).face(PHOTO).embedding


def seen(pipe: Pipeline, who: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The embedding that each method conditions on, by the method's name."""
    found: dict[str, np.ndarray] = {}

    def watched(method: Any) -> Any:
        real = method.condition

        def condition(orders: Any) -> Any:
            found[method.name] = orders[0].embedding
            return real(orders)

        return condition

    for method in pipe.methods:
        monkeypatch.setattr(method, "condition", watched(method))
    pipe.generate(who, "a man", seed=1, output="latent", **tiny.SMALL)
    return found


@pytest.mark.parametrize("order", [1, -1], ids=["InstantID first", "FaceID first"])
def test_each_method_reads_its_own_recognisers_embedding_of_a_photo(
    here: dict[str, Path], monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    read = seen(load("+".join(BOTH.split("+")[::order])), PHOTO, monkeypatch)
    np.testing.assert_array_equal(read["instantid"], by(here, "antelopev2"))
    np.testing.assert_array_equal(read["ip-adapter-faceid-plusv2"], by(here, "buffalo_l"))
    assert not np.array_equal(by(here, "antelopev2"), by(here, "buffalo_l"))


def test_a_method_without_a_face_before_one_with_a_face_does_not_choose_its_recogniser(here: dict[str, Path]) -> None:
    classes = [idgen.registry.method(name) for name in ("ip-adapter", "ip-adapter-faceid-plusv2")]
    extractor, further = api._extractors_if_here(classes, tiny.backbone())
    assert extractor is not None and extractor.recogniser_name == "w600k_r50" and further == {}


def test_an_identity_made_by_the_pipeline_serves_every_method(
    here: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load()
    who = pipe.identity(PHOTO, name="Ada")
    assert set(who.embeddings) == {"glintr100", "w600k_r50"} and who.name == "Ada"
    read = seen(pipe, who, monkeypatch)
    np.testing.assert_array_equal(read["instantid"], by(here, "antelopev2"))
    np.testing.assert_array_equal(read["ip-adapter-faceid-plusv2"], by(here, "buffalo_l"))


@pytest.mark.parametrize(("only", "lacks"), [("antelopev2", "w600k_r50"), ("buffalo_l", "glintr100")])
def test_an_identity_that_one_method_cannot_read_is_refused_with_the_cure(
    here: dict[str, Path], only: str, lacks: str
) -> None:
    who = Identity.from_photos(PHOTO, FaceExtractor(here[only]))
    with pytest.raises(BadRequest, match=rf"no embedding by {lacks}.*Give the photos.*identity\(\)"):
        load().order(idgen.Request.create(who=who))


def test_a_recogniser_that_is_not_here_is_named_and_no_other_takes_its_place(here: dict[str, Path]) -> None:
    del here["buffalo_l"]
    pipe = load()
    for who in (PHOTO, Identity.from_photos(PHOTO, FaceExtractor(here["antelopev2"]))):
        with pytest.raises(WeightsMissing, match="buffalo_l"):
            pipe.order(idgen.Request.create(who=who))


def test_a_bare_embedding_and_an_extractor_given_by_hand_are_believed(
    here: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = seen(load(), tiny.person(), monkeypatch)
    assert all(np.array_equal(each, tiny.person().embedding) for each in read.values()) and len(read) == 2
    own = FaceExtractor(here["buffalo_l"])
    pipe = idgen.load(BOTH, base=tiny.backbone(), faces=own)
    read = seen(pipe, PHOTO, monkeypatch)
    assert all(np.array_equal(each, own.face(PHOTO).embedding) for each in read.values()) and len(read) == 2
