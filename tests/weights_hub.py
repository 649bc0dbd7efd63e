"""A hub and a host of zip files on 127.0.0.1, the manifest that names them, and zips as a hostile tool writes them."""

from __future__ import annotations

import hashlib
import json
import stat
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from idgen.weights.store import Store

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


@contextmanager
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Run a world that idgen takes for the internet, with a store and a hub cache of its own under ``tmp_path``."""
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


def leftovers(store: Store) -> list[str]:
    return [path.name for path in store.root.glob(".staging-*")]
