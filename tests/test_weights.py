"""The manifest, the store and the command ``idgen weights``, against servers on 127.0.0.1 and hostile archives."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from idgen.cli.weights import app
from idgen.errors import BadRequest, BadWeights, LicenceRefused, WeightsMissing
from idgen.weights import archive, fetch, licences, manifest
from idgen.weights.archive import safe_member_path, unzip
from idgen.weights.sniff import refuse_mislabelled
from idgen.weights.store import Store, mini_dir
from tests.conftest import REPOSITORY

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_FILES = {"one.bin": b"one" * 1000, "two/a.json": b"{}", "two/b.bin": b"b" * 5000, "other.bin": b"x"}
PACK = {"wrapped/det.onnx": b"detector" * 100, "wrapped/rec.onnx": b"recogniser" * 100}

MANIFEST = """
[one]
repo = "owner/repo"
files = ["one.bin"]
size_approx = 3000
base = "sdxl"
kind = "adapter"
licence = "mit"
commercial = true
needs = ["pack"]

[two]
repo = "owner/repo"
files = ["two/a.json", "two/*.bin"]
size_approx = 5000
base = "any"
kind = "image-encoder"
licence = "mit"
commercial = true

[gone]
repo = "owner/repo"
files = ["not-there.bin"]
size_approx = 5000
base = "any"
kind = "lora"
licence = "none stated"
commercial = "unclear"

[pack]
url = "URL/pack.zip"
files = ["det.onnx", "rec.onnx"]
size_approx = 2000
base = "any"
kind = "face-pack"
licence = "research only"
commercial = false
"""


class World:
    """A web server that is both the hub and a zip host, and says what it was asked."""

    def __init__(self) -> None:
        self.zip = b""
        self.break_off_at: int | None = None
        self.stall: threading.Event | None = None
        self.asked: list[str] = []
        self.files = dict(HUB_FILES)
        world = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def reply(self, body: bytes, headers: dict[str, str], code: int = 200) -> None:
                self.send_response(code)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    if world.stall:
                        self.wfile.write(body[:100])
                        world.stall.wait(20)
                    cut = world.break_off_at
                    self.wfile.write(body if cut is None else body[:cut])
                    if cut is not None:
                        self.close_connection = True

            def do_GET(self) -> None:
                world.asked.append(f"{self.command} {self.path}")
                path = self.path.split("?")[0]
                if path == "/pack.zip":
                    return self.reply(world.zip, {})
                if path.startswith("/api/models/owner/repo/tree/"):
                    tree = [
                        {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                        for name, body in world.files.items()
                    ]
                    return self.reply(json.dumps(tree).encode(), {"Content-Type": "application/json"})
                if path.startswith("/api/models/owner/repo"):
                    info = {
                        "id": "owner/repo",
                        "modelId": "owner/repo",
                        "sha": COMMIT,
                        "private": False,
                        "tags": [],
                        "downloads": 0,
                        "siblings": [{"rfilename": name} for name in world.files],
                    }
                    return self.reply(json.dumps(info).encode(), {"Content-Type": "application/json"})
                if path.startswith("/owner/repo/resolve/"):
                    name = path.split("/", 5)[5]
                    if name in world.files:
                        body = world.files[name]
                        etag = hashlib.sha256(body).hexdigest()
                        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{etag}"'}
                        return self.reply(body, {**headers, "X-Linked-Size": str(len(body))})
                    return self.reply(b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, 404)
                return self.reply(b"", {}, 404)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


def make_zip(path: Path, members: dict[str, bytes], **attributes: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, body in members.items():
            info = zipfile.ZipInfo(name)
            info.filename = name  # ZipInfo tidies names; a hostile tool does not
            info.external_attr = attributes.get("mode", stat.S_IFREG | 0o644) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            bundle.writestr(info, body)
    return path


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    from huggingface_hub import constants

    world = World()
    world.zip = make_zip(tmp_path / "made.zip", PACK).read_bytes()
    extra = tmp_path / "extra.toml"
    extra.write_text(MANIFEST.replace("URL", world.url), encoding="utf-8")
    monkeypatch.setenv("IDGEN_MANIFEST", str(extra))
    monkeypatch.setenv("IDGEN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv("IDGEN_COMMERCIAL_ONLY", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", world.url)
    template = world.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield world
    world.server.shutdown()
    world.server.server_close()


@pytest.fixture
def store(world: World) -> Store:
    return Store()


def leftovers(store: Store) -> list[str]:
    return [path.name for path in store.root.glob(".staging-*")]


# --- manifest -------------------------------------------------------------------------------------------------------


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


# --- safe paths and zips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "a/../../x", "/x", "//host/x", "a/..", "..", ".", "/", ""),
        *("\\x", "..\\x", "a\\..\\..\\x", "C:\\x", "C:x", "a/C:/x", "\\\\host\\x", "x:y"),
        *("nul", "NUL.txt", "a/com1", "a.", "a/b./c", "x ", "a /b", "x*", "x?", "x|y"),
        *("a\0b", "a\nb", "a" * 256, "\ud800"),
    ],
)
def test_hostile_member_names_are_refused(name: str) -> None:
    with pytest.raises(BadWeights):
        safe_member_path(name)


@given(st.text(alphabet=st.sampled_from("./\\:ab \0~C-%"), max_size=20) | st.text(max_size=30))
def test_a_safe_path_never_leaves_its_folder(name: str) -> None:
    try:
        path = safe_member_path(name)
    except BadWeights:
        return
    assert isinstance(path, PurePosixPath) and not path.is_absolute() and path.parts
    assert ".." not in path.parts and not any(char in str(path) for char in "\\:\0")
    base = os.path.abspath("base")  # noqa: PTH100
    inside = os.path.normpath(os.path.join(base, *path.parts))  # noqa: PTH118
    assert inside.startswith(base + os.sep)
    assert safe_member_path(str(path)) == path


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "a/../../escaped", "..\\escaped", "C:\\escaped"])
def test_zip_members_that_climb_out_write_nothing(tmp_path: Path, name: str) -> None:
    evil = make_zip(tmp_path / "evil.zip", {"good.onnx": b"good", name: b"evil"})
    with pytest.raises(BadWeights, match="unsafe path"):
        unzip(evil, tmp_path / "deep" / "into")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "evil.zip"]


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o644, stat.S_IFCHR | 0o644])
def test_links_and_special_files_are_refused(tmp_path: Path, mode: int) -> None:
    evil = make_zip(tmp_path / "evil.zip", {"link": b"/etc/passwd"}, mode=mode)
    with pytest.raises(BadWeights, match=r"link|special"):
        unzip(evil, tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = make_zip(tmp_path / "bomb.zip", {f"{i}": bytes(4 << 20) for i in range(4)})
    with pytest.raises(BadWeights, match="at most"):
        unzip(bomb, tmp_path / "into", max_bytes=1 << 20)
    with pytest.raises(BadWeights, match="members"):
        unzip(bomb, tmp_path / "into", max_members=2)
    monkeypatch.setattr(archive, "RATIO_FREE_BYTES", 1 << 20)
    with pytest.raises(BadWeights, match="bomb"):
        unzip(bomb, tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_a_member_that_lies_about_its_size(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "liar.zip", {"a": bytes(100_000)})
    body = path.read_bytes().replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    path.write_bytes(body)
    with pytest.raises(BadWeights):
        unzip(path, tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_two_members_of_one_name(tmp_path: Path) -> None:
    for i, names in enumerate((("a", "A"), ("a", "a/b"))):
        path = make_zip(tmp_path / f"{i}.zip", dict.fromkeys(names, b"x"))
        with pytest.raises(BadWeights):
            unzip(path, tmp_path / "into")


def test_damaged_zips(tmp_path: Path) -> None:
    whole = make_zip(tmp_path / "whole.zip", {"a": os.urandom(10_000)}).read_bytes()
    flipped = bytearray(whole)
    flipped[500] ^= 1
    for body in (whole[:5000], whole[: len(whole) - 30], bytes(flipped), b"", b"<html>404</html>"):
        path = tmp_path / "bad.zip"
        path.write_bytes(body)
        with pytest.raises(BadWeights, match="Download it again"):
            unzip(path, tmp_path / "into")
        assert not (tmp_path / "into").exists()


def test_a_wrapping_folder_is_dropped(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "p.zip", {"p/p/a.onnx": b"a", "p/p/sub/b": b"b"})
    files = unzip(path, tmp_path / "into")
    assert [file.relative_to(tmp_path / "into").as_posix() for file in files] == ["a.onnx", "sub/b"]


# --- store ----------------------------------------------------------------------------------------------------------


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


def test_offline_works_with_what_is_here(store: Store, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    store.pull("one", accept_licence=True, progress=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    world.server.shutdown()
    assert store.pull("one", progress=False).is_file()
    (store.root / "weights.lock.json").unlink()  # as after `hf download` by hand: no record
    assert store.has("one") and store.path("pack").is_dir()
    assert sorted(store.present()) == ["one", "pack"]
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


HEADER = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
SAFETENSORS = struct.pack("<Q", len(HEADER)) + HEADER + bytes(8)


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("x.bin", b"", "empty"),
        ("x.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("x.onnx", b"\n <!DOCTYPE html><title>Sign in", "web page"),
        ("x.json", b"{", "not valid JSON"),
        ("x.json", b"[" * 100_000, "not valid JSON"),
        ("x.safetensors", b"\x80\x02.", "too short"),
        ("x.safetensors", SAFETENSORS[:-1], "it should be"),
        ("x.safetensors", SAFETENSORS + b"\0", "it should be"),
        ("x.safetensors", SAFETENSORS[:20], "header is cut off"),
        ("x.safetensors", b"\xff" * 100, "header is cut off"),
        ("x.safetensors", struct.pack("<Q", 40) + b"{" * 40, "header is damaged"),
        ("x.safetensors", struct.pack("<Q", 13) + b'{"w": [1, 2]}', "header is damaged"),
    ],
)
def test_files_that_are_not_what_they_claim(tmp_path: Path, name: str, body: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(BadWeights, match=says):
        refuse_mislabelled(tmp_path / name)


def test_whole_files_pass(tmp_path: Path) -> None:
    for name, body in (("x.safetensors", SAFETENSORS), ("x.json", b"{}"), ("x.bin", b"PK"), ("x.onnx", b"\x08")):
        (tmp_path / name).write_bytes(body)
        refuse_mislabelled(tmp_path / name)


def test_a_web_page_saved_as_weights_is_not_added(store: Store, world: World, tmp_path: Path) -> None:
    (tmp_path / "one.bin").write_bytes(b"<html>please log in</html>")
    with pytest.raises(BadWeights, match="web page"):
        store.add(tmp_path / "one.bin")
    assert not store.has("one") and not leftovers(store)


# --- bundles --------------------------------------------------------------------------------------------------------


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


# --- command and imports --------------------------------------------------------------------------------------------


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_mini_is_here() -> None:
    folder = mini_dir()
    assert folder is not None and folder.samefile(REPOSITORY / "weights" / "mini")
    assert (folder / "mini-xl" / "model_index.json").is_file()
