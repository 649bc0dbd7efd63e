"""Archives and files from outside: hostile names, links, bombs, damage, and files that are not what they claim."""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idgen.errors import BadWeights
from idgen.weights import archive
from idgen.weights.archive import safe_member_path, unzip
from idgen.weights.sniff import refuse_mislabelled
from tests.weights_hub import make_zip


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


def test_an_encrypted_zip_is_refused_as_such(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "locked.zip", {"a": b"secret"})
    body = bytearray(path.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        body[body.index(header) + flags] |= 1
    path.write_bytes(bytes(body))
    with pytest.raises(BadWeights, match="'a' is encrypted"):
        unzip(path, tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "p.zip", {"a.onnx": b"a"})
    (tmp_path / "into").mkdir()
    with pytest.raises(BadWeights, match="already there"):
        unzip(path, tmp_path / "into")
    assert not list((tmp_path / "into").iterdir())


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
