"""The manifest, the store and the command ``idgen weights``, against servers on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from idgen.cli.weights import app
from idgen.errors import BadRequest, BadWeights, LicenceRefused, WeightsMissing
from idgen.weights import fetch, licences, manifest
from idgen.weights.store import Store, mini_dir
from tests.conftest import REPOSITORY
from tests.weights_hub import COMMIT, HUB_FILES, MANIFEST, PACK, World, leftovers, make_zip, serve


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with serve(tmp_path, monkeypatch) as world:
        yield world


@pytest.fixture
def store(world: World) -> Store:
    return Store()


def test_bundled_manifest_is_sound() -> None:
    entries = manifest._load("")
    for name in ("sdxl", "sd15", "clip-vit-h", "clip-vit-bigg", "instantid", "arc2face", "antelopev2", "buffalo_l"):
        assert name in entries
    assert entries["clip-vit-h"].folder == "models/image_encoder"
    assert entries["instantid"].folder == ""
    assert entries["antelopev2"].commercial is False
    assert entries["ip-adapter-faceid_sdxl"].is_single_file
    assert all(".bin" not in f or e.repo != "h94/IP-Adapter" for e in entries.values() for f in e.files)
    with pytest.raises(AttributeError):
        entries["sdxl"].repo = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('kind = "adapter"', 'kind = "adaptor"', "kind is 'adaptor'"),
        ('licence = "mit"', 'licence = "mit"\nlicense = "mit"', "unknown field 'license'"),
        ('files = ["one.bin"]', 'files = ["../one.bin"]', "climbs out"),
        ('files = ["one.bin"]', "files = []", "files is missing"),
        ('base = "sdxl"', 'base = "sd3"', "base is 'sd3'"),
        ("size_approx = 3000", "size_approx = -1", "size_approx"),
        ("size_approx = 3000", "size_approx = true", "size_approx"),
        ("commercial = true", 'commercial = "maybe"', "commercial"),
        ('needs = ["pack"]', 'needs = ["nothing"]', "needs 'nothing'"),
        ('needs = ["pack"]', 'needs = ["one"]', "circle"),
        ('repo = "owner/repo"', 'repo = "owner"', "owner/name"),
        ('repo = "owner/repo"', "", "either repo or url"),
        ('repo = "owner/repo"', 'url = "file:///etc/passwd"', "https"),
        ("[one]", '["../one"]', "a name is made of"),
        ("[one]", "[sdxl]", "already taken"),
        ("[one]", "[one", "not valid TOML"),
    ],
)
def test_malformed_manifest_names_entry_and_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, says: str
) -> None:
    path = tmp_path / "extra.toml"
    assert old in MANIFEST
    path.write_text(MANIFEST.replace("URL", "https://example.org").replace(old, new, 1), encoding="utf-8")
    monkeypatch.setenv("IDGEN_MANIFEST", str(path))
    with pytest.raises(BadWeights) as error:
        manifest.load_manifest()
    assert says in str(error.value) and ("extra.toml" in str(error.value) or "manifest" in str(error.value))


def test_wrong_name_suggests_the_nearest(store: Store) -> None:
    for call in (store.path, store.has, store.pull, store.verify):
        with pytest.raises(BadRequest, match="Did you mean instantid"):
            call("instant-id")  # type: ignore[operator]


def test_missing_weights_name_the_exact_command(store: Store) -> None:
    assert not store.has("one")
    with pytest.raises(WeightsMissing, match=r"idgen weights pull two$"):
        store.path("two")
    for name in ("pack", "one"):  # "one" itself is free, but what it needs is not
        with pytest.raises(WeightsMissing, match=rf"idgen weights pull {name} --accept-licence$"):
            store.path(name)


def test_pull_from_the_hub_and_a_zip(store: Store, world: World) -> None:
    path = store.pull("one", accept_licence=True, progress=False)
    assert path.read_bytes() == HUB_FILES["one.bin"]
    assert path.is_relative_to(Path(os.environ["IDGEN_HOME"]).parent / "hub")
    pack = store.path("pack")
    assert sorted(file.name for file in pack.iterdir()) == ["det.onnx", "rec.onnx"]
    assert pack == store.root / "models" / "pack"  # where insightface's FaceAnalysis(root=...) looks
    assert store.hashes("one") == {"one.bin": hashlib.sha256(HUB_FILES["one.bin"]).hexdigest()}
    assert all(check.status == "ok" for check in store.verify()) and len(store.verify()) == 3
    assert not leftovers(store)
    world.asked.clear()
    store.pull("one", progress=False)  # all here: asks nobody, and nothing to accept
    assert world.asked == []


def test_several_files_give_their_folder(store: Store, world: World) -> None:
    path = store.pull("two", progress=False)
    assert path.name == "two" and (path / "b.bin").read_bytes() == HUB_FILES["two/b.bin"]
    assert not (path.parent / "other.bin").exists()
    assert set(store.hashes("two")) == {"two/a.json", "two/b.bin"}


def test_single_file_commit_is_pinned(store: Store, world: World) -> None:
    store.pull("two", progress=False)
    assert store.lock.read()["two"].commit == COMMIT


def test_licences(store: Store, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pack", "one", "gone"):  # "one" needs "pack"; "gone" has unclear terms
        with pytest.raises(LicenceRefused, match="--accept-licence"):
            store.pull(name, progress=False)
    assert world.asked == []
    assert store.pull("one", needs=False, progress=False).is_file()
    monkeypatch.setenv("IDGEN_COMMERCIAL_ONLY", "1")
    with pytest.raises(LicenceRefused, match="pack is not for commercial use"):
        store.pull("one", accept_licence=True, progress=False)
    with pytest.raises(LicenceRefused, match="gone is of unclear terms"):
        Store.refuse_if_not_commercial(["two", "gone"])
    Store.refuse_if_not_commercial(["two"])
    for value, on in (("1", True), ("true", True), ("yes please", True), ("0", False), ("", False), ("off", False)):
        monkeypatch.setenv("IDGEN_COMMERCIAL_ONLY", value)
        assert licences.commercial_only() is on is store.commercial_only()


def test_verify_finds_a_flipped_byte_and_a_missing_file(store: Store, world: World) -> None:
    store.pull("one", accept_licence=True, progress=False)
    target = store.path("pack") / "det.onnx"
    body = bytearray(target.read_bytes())
    body[7] ^= 1
    target.write_bytes(bytes(body))
    (store.path("one").resolve()).unlink()
    verdicts = {(check.name, check.file): check for check in store.verify()}
    assert verdicts["pack", "det.onnx"].status == "changed"
    assert verdicts["pack", "rec.onnx"].status == "ok"
    assert verdicts["one", "one.bin"].status == "missing"
    assert "idgen weights pull pack --force --accept-licence" in verdicts["pack", "det.onnx"].cure
    assert not store.has("one")
    store.pull("pack", accept_licence=True, progress=False, force=True)
    store.pull("one", progress=False)
    assert all(check.ok for check in store.verify())


def test_a_flipped_byte_in_the_hub_cache_is_repaired(store: Store, world: World) -> None:
    store.pull("two", progress=False)
    blob = (store.path("two") / "b.bin").resolve()
    blob.chmod(0o644)
    blob.write_bytes(b"c" + blob.read_bytes()[1:])
    assert [check.status for check in store.verify("two")] == ["ok", "changed"]
    store.lock.put("two", None)  # never recorded: the hub's own name for the blob still gives it away
    assert "changed" in [check.status for check in store.verify("two")]
    store.pull("two", progress=False, force=True)
    assert all(check.status == "ok" for check in store.verify("two"))


def test_a_flipped_byte_in_a_single_file_is_repaired(store: Store, world: World) -> None:
    store.pull("one", accept_licence=True, progress=False)
    blob = store.path("one").resolve()
    blob.chmod(0o644)
    blob.write_bytes(b"c" + blob.read_bytes()[1:])
    assert [check.status for check in store.verify("one")] == ["changed"]
    store.pull("one", progress=False, force=True)
    assert [check.status for check in store.verify("one")] == ["ok"]


def test_a_file_of_another_size_is_never_handed_out(store: Store, world: World) -> None:
    store.pull("pack", accept_licence=True, progress=False)
    with (store.path("pack") / "det.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BadWeights, match="--force"):
        store.path("pack")


@pytest.mark.parametrize("at", [0, 100])
def test_an_interrupted_download_leaves_nothing(store: Store, world: World, at: int) -> None:
    world.break_off_at = at
    with pytest.raises((BadWeights, WeightsMissing), match="idgen weights pull pack"):
        store.pull("pack", accept_licence=True, progress=False)
    assert not store.has("pack") and not leftovers(store) and not store.lock.read()
    assert not (store.root / "models").exists()
    world.break_off_at = None
    assert store.pull("pack", accept_licence=True, progress=False).is_dir()


def test_a_killed_process_leaves_nothing_half_written(store: Store, world: World) -> None:
    world.stall = threading.Event()
    code = "from idgen.weights.store import Store; Store().pull('pack', True, False)"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "0"}) as child:
        try:
            deadline = time.monotonic() + 30
            while not (world.asked and leftovers(store)):
                assert child.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            child.kill()
    world.stall.set()
    world.stall = None
    assert not store.has("pack") and not store.lock.read() and not (store.root / "models").exists()
    assert leftovers(store)
    for path in store.root.glob(".staging-*"):
        os.utime(path, (0, 0))
    assert store.pull("pack", accept_licence=True, progress=False).is_dir()
    assert not leftovers(store)  # what the killed process left was swept


def test_a_hostile_zip_from_the_server(store: Store, world: World, tmp_path: Path) -> None:
    for members in ({"../../escaped": b"x", **PACK}, {"wrapped/det.onnx": b"only one of two"}):
        world.zip = make_zip(tmp_path / "evil.zip", members).read_bytes()
        with pytest.raises(BadWeights):
            store.pull("pack", accept_licence=True, progress=False)
        assert not store.has("pack") and not leftovers(store)
    assert not list(tmp_path.rglob("escaped"))


def test_a_server_that_sends_without_end(store: Store, world: World) -> None:
    world.zip = bytes((64 << 20) + 1)
    with pytest.raises(BadWeights, match="sends more than"):
        store.pull("pack", accept_licence=True, progress=False)
    assert not leftovers(store)


def test_a_source_that_changed_is_refused_until_told(store: Store, world: World, tmp_path: Path) -> None:
    store.pull("pack", accept_licence=True, progress=False)
    before = store.hashes("pack")
    world.zip = make_zip(tmp_path / "new.zip", {"det.onnx": b"other", "rec.onnx": b"other"}).read_bytes()
    with pytest.raises(BadWeights, match=r"differs from what was first downloaded.*--update"):
        store.pull("pack", accept_licence=True, progress=False, force=True)
    assert store.hashes("pack") == before and all(check.status == "ok" for check in store.verify())
    store.pull("pack", accept_licence=True, progress=False, update=True)
    assert store.hashes("pack") != before and all(check.status == "ok" for check in store.verify())


def test_what_is_removed_is_forgotten_and_may_come_back_different(store: Store, world: World, tmp_path: Path) -> None:
    store.pull("pack", accept_licence=True, progress=False)
    assert store.remove("pack") and not store.remove("pack")
    assert not store.has("pack") and not store.hashes("pack") and not (store.root / "models" / "pack").exists()
    world.zip = make_zip(tmp_path / "new.zip", {"det.onnx": b"other", "rec.onnx": b"other"}).read_bytes()
    store.pull("pack", accept_licence=True, progress=False)
    assert all(check.ok for check in store.verify("pack"))


def test_offline_works_with_what_is_here(store: Store, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    store.pull("one", accept_licence=True, progress=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    world.server.shutdown()
    assert store.pull("one", progress=False).is_file()
    (store.root / "weights.lock.json").unlink()  # as after `hf download` by hand: no record
    assert store.has("one") and store.path("pack").is_dir()
    assert sorted(store.present()) == ["one", "pack"]
    assert store.pull("one", progress=False).is_file() and not store.hashes("two")
    assert set(store.hashes("one")) == {"one.bin"} and len(store.hashes("pack")) == 2, "a pull records what it finds"
    with pytest.raises(WeightsMissing, match="HF_HUB_OFFLINE is set"):
        store.pull("two", progress=False)
    store.remove("pack")
    with pytest.raises(WeightsMissing, match="HF_HUB_OFFLINE is set"):
        store.pull("pack", accept_licence=True, progress=False)


def test_failures_of_the_network_and_the_hub(store: Store, world: World) -> None:
    with pytest.raises(WeightsMissing, match="gone could not be downloaded"):
        store.pull("gone", accept_licence=True, progress=False)
    del world.files["two/b.bin"]
    with pytest.raises(WeightsMissing, match=r"no two/\*\.bin in owner/repo"):
        store.pull("two", progress=False)
    assert not store.has("two")


def test_no_room_on_the_disk(store: Store, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: type("U", (), {"free": 10})())
    with pytest.raises(WeightsMissing, match="GB free"):
        store.pull("two", progress=False)
    assert world.asked == []


def test_a_pack_that_insightface_fetched_is_found(store: Store, world: World, tmp_path: Path) -> None:
    nested = tmp_path / ".insightface" / "models" / "pack" / "pack"
    nested.mkdir(parents=True)
    for name in ("det.onnx", "rec.onnx"):
        (nested / name).write_bytes(b"x")
    assert store.path("pack") == nested


def test_a_damaged_lock_file_says_so(store: Store) -> None:
    store.root.mkdir()
    for text in ("{", "[]", '{"entries": {"one": {"files": {}, "nonsense": 1}}}', "\xff"):
        (store.root / "weights.lock.json").write_text(text, encoding="latin-1")
        with pytest.raises(BadWeights, match="Delete it"):
            store.has("one")


def test_two_processes_that_pull_the_same(store: Store, world: World) -> None:
    with ThreadPoolExecutor(4) as pool:
        pulls = [pool.submit(Store().pull, "pack", True, False, force=True) for _ in range(4)]
        assert {pull.result() for pull in pulls} == {store.path("pack")}
    assert all(check.status == "ok" for check in store.verify()) and not leftovers(store)


def test_command(store: Store, world: World, tmp_path: Path) -> None:
    run = CliRunner().invoke
    listed = json.loads(run(app, ["list", "--json"]).stdout)
    assert {entry["name"]: entry["present"] for entry in listed}["one"] is False
    refused = run(app, ["pull", "one"])
    assert refused.exit_code == 2 and "--accept-licence" in refused.output and "Traceback" not in refused.output
    typo = run(app, ["pull", "one", "tow", "--accept-licence"])
    assert typo.exit_code == 2 and "Did you mean two" in typo.output and not store.has("one")
    pulled = run(app, ["pull", "one", "two", "--accept-licence", "--json"])
    assert pulled.exit_code == 0 and set(json.loads(pulled.stdout)) == {"one", "two"}
    assert run(app, ["path", "one"]).stdout.strip() == str(store.path("one"))
    assert "one" in run(app, ["list", "--present"]).stdout
    assert run(app, ["verify"]).exit_code == 0
    (store.path("pack") / "det.onnx").write_bytes(b"x")
    verdict = run(app, ["verify", "pack", "--json"])
    assert verdict.exit_code == 1 and json.loads(verdict.stdout)[0]["status"] == "changed"
    assert run(app, ["path", "pack"]).exit_code == 2
    assert run(app, ["bundle", "two", "--out", str(tmp_path / "b.zip")]).exit_code == 0
    assert run(app, ["remove", "pack"]).exit_code == 0 and not store.has("pack")
    assert run(app, ["add", str(tmp_path / "b.zip"), "--json"]).exit_code == 0


def test_imports_are_light() -> None:
    code = (
        "import sys, idgen.weights.manifest, idgen.weights.store, idgen.weights.bundles, idgen.cli.weights\n"
        "idgen.weights.manifest.load_manifest()\n"
        "print([m for m in ('torch', 'huggingface_hub', 'diffusers', 'requests') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_mini_is_here() -> None:
    folder = mini_dir()
    assert folder is not None and folder.samefile(REPOSITORY / "weights" / "mini")
    assert (folder / "mini-xl" / "model_index.json").is_file()
