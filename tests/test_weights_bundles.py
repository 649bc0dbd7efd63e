"""Weights carried by hand: bundles for machines without network, and files that somebody downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from idgen.errors import BadRequest, BadWeights, LicenceRefused
from idgen.weights.store import Store
from tests.weights_hub import COMMIT, HUB_FILES, World, leftovers, serve


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with serve(tmp_path, monkeypatch) as world:
        yield world


@pytest.fixture
def store(world: World) -> Store:
    return Store()


def test_a_web_page_saved_as_weights_is_not_added(store: Store, world: World, tmp_path: Path) -> None:
    (tmp_path / "one.bin").write_bytes(b"<html>please log in</html>")
    with pytest.raises(BadWeights, match="web page"):
        store.add(tmp_path / "one.bin")
    assert not store.has("one") and not leftovers(store)


@pytest.mark.parametrize("name", ["carry", "carry.zip"])
def test_a_bundle_brings_weights_to_a_machine_without_network(
    store: Store, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from huggingface_hub import constants

    store.pull("one", accept_licence=True, progress=False)
    store.pull("two", progress=False)
    out = store.bundle(["one", "two"], tmp_path / name)
    with pytest.raises(BadRequest, match="already there"):
        store.bundle(["one"], out)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    other = Store(tmp_path / "other")
    with pytest.raises(LicenceRefused, match="pack"):
        other.add(out)
    assert not other.present()
    assert sorted(other.add(out, accept_licence=True)) == ["one", "pack", "two"]
    assert other.path("one").read_bytes() == HUB_FILES["one.bin"]
    assert (other.path("two") / "b.bin").is_file() and other.path("pack").is_dir()
    assert other.lock.read()["one"].commit == COMMIT
    assert all(check.status == "ok" for check in other.verify()) and not leftovers(other)


@pytest.mark.parametrize("name", ["carry", "carry.zip"])
def test_one_entry_is_taken_out_of_a_bundle(store: Store, world: World, tmp_path: Path, name: str) -> None:
    store.pull("one", accept_licence=True, progress=False)
    store.pull("two", progress=False)
    out, other = store.bundle(["one", "two"], tmp_path / name), Store(tmp_path / "other")
    assert other.add(out, "two") == ["two"]
    assert sorted(other.lock.read()) == ["two"] and sorted(p.name for p in (other.root / "models").iterdir()) == ["two"]
    with pytest.raises(BadRequest, match="no 'gone'; it has pack, one, two") as refused:
        other.add(out, "gone")
    assert refused.value.field == "name"


def test_what_a_killed_bundle_left_is_not_carried_along(store: Store, world: World, tmp_path: Path) -> None:
    store.pull("two", progress=False)
    (tmp_path / ".carry.part").mkdir()
    (tmp_path / ".carry.part" / "left").write_bytes(b"x")
    bundle = store.bundle(["two"], tmp_path / "carry")
    assert sorted(path.name for path in bundle.iterdir()) == ["idgen-bundle.json", "two"]
    assert not (tmp_path / ".carry.part").exists()


def test_damaged_weights_are_not_bundled(store: Store, world: World, tmp_path: Path) -> None:
    store.pull("two", progress=False)
    blob = (store.path("two") / "b.bin").resolve()
    blob.chmod(0o644)
    blob.write_bytes(b"c" + blob.read_bytes()[1:])
    with pytest.raises(BadWeights, match=r"b\.bin differs from what was first downloaded"):
        store.bundle(["two"], tmp_path / "carry")
    assert not list(tmp_path.glob("*carry*"))


def test_damaged_and_hostile_bundles(store: Store, world: World, tmp_path: Path) -> None:
    store.pull("two", progress=False)
    bundle = store.bundle(["two"], tmp_path / "carry")
    index = json.loads((bundle / "idgen-bundle.json").read_text())
    other = Store(tmp_path / "other")

    def refused(says: str) -> None:
        with pytest.raises(BadWeights, match=says):
            other.add(bundle)
        assert not other.lock.read() and not leftovers(other) and not (other.root / "models").exists()

    (bundle / "two" / "two" / "b.bin").write_bytes(b"x")
    refused("damaged")
    (bundle / "two" / "two" / "b.bin").unlink()
    refused("lacks")
    (tmp_path / "elsewhere").write_bytes(HUB_FILES["two/b.bin"])
    (bundle / "two" / "two" / "b.bin").symlink_to(tmp_path / "elsewhere")
    refused("lacks")
    (bundle / "two" / "two" / "b.bin").unlink()
    (bundle / "two" / "two" / "b.bin").write_bytes(HUB_FILES["two/b.bin"])
    for path in ("../../x", "/etc/passwd"):
        evil = json.loads(json.dumps(index))
        evil["entries"]["two"]["files"][path] = {"sha256": "0" * 64, "size": 1}
        (bundle / "idgen-bundle.json").write_text(json.dumps(evil))
        refused("unsafe path")
    evil = json.loads(json.dumps(index))
    evil["entries"]["two"]["files"]["sitecustomize.py"] = {"sha256": "0" * 64, "size": 1}
    (bundle / "idgen-bundle.json").write_text(json.dumps(evil))
    refused("not one of the files")
    (bundle / "idgen-bundle.json").write_text("{}")
    refused("damaged")


def test_adding_files_that_were_downloaded_by_hand(store: Store, world: World, tmp_path: Path) -> None:
    (tmp_path / "one.bin").write_bytes(HUB_FILES["one.bin"])
    assert store.add(tmp_path / "one.bin") == ["one"]
    assert store.path("one").read_bytes() == HUB_FILES["one.bin"]
    (tmp_path / "pack.zip").write_bytes(world.zip)
    with pytest.raises(LicenceRefused):
        store.add(tmp_path / "pack.zip")
    assert store.add(tmp_path / "pack.zip", accept_licence=True) == ["pack"]
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "a.json").write_bytes(b"{}")
    with pytest.raises(BadRequest, match="--name"):
        store.add(folder)
    with pytest.raises(BadWeights, match="it has no"):
        store.add(folder, "two")
    (folder / "b.bin").write_bytes(b"b")
    assert store.add(folder, "two") == ["two"] and store.path("two").name == "two"
    (tmp_path / "one.bin").write_bytes(b"something else")
    with pytest.raises(BadWeights, match="differs from what was first downloaded"):
        store.add(tmp_path / "one.bin")
    with pytest.raises(BadRequest, match="nothing at"):
        store.add(tmp_path / "nowhere")
