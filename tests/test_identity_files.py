"""Files of identities: they come back bit-equal, and what is no intact identity is refused."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from idgen.errors import BadRequest, BadWeights, IdgenError
from idgen.identity import Identity
from tests.identities import POINTS, vector, whole


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
        key: vector(number) if not count else np.stack([vector(number + each) for each in range(count)])
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
    whole(0).save(file)
    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(BadRequest, match="disk full"):
            whole(1).save(file)
    assert Identity.load(file) == whole(0) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("path", ["no/such/folder/ada.safetensors", ".", "a\0b"])
def test_a_place_that_cannot_be_written_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRequest) as caught:
        whole().save(path)
    assert caught.value.field == "path" and list(tmp_path.iterdir()) == []


class _Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


def _file(**changes) -> bytes:
    tensors = {"embedding.a": vector(0), **changes.pop("tensors", {})}
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


def test_equal_identities_are_equal_bytes():
    face = Identity(np.linspace(-1, 1, 512), np.arange(10.0).reshape(5, 2), name="Ada", keypoints_size=(64, 48))
    assert len({face.to_bytes() for _ in range(20)}) == 1
    assert Identity.from_bytes(face.to_bytes()) == face
