"""Photos: everything an image file can be becomes upright RGB, everything else a BadImage naming the cure."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from idgen.errors import BadImage
from idgen.images import MAX_SIDE, content_hash, open_photo


def _saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(width: int = 40, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    return tuple(int(value) for value in np.asarray(image)[y, x])


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP", "PPM", "GIF"])
def test_a_path_the_bytes_the_image_and_the_array_give_the_same_photo(kind, tmp_path):
    image = _noise().quantize(32).convert("RGB")
    data = _saved(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    file = tmp_path / "photo.bin"
    file.write_bytes(data)
    sources = [str(file), file, data, bytearray(data), memoryview(data), image, np.asarray(image)]
    photos = [open_photo(source) for source in sources]
    assert {(photo.mode, photo.size) for photo in photos} == {("RGB", image.size)}
    assert {content_hash(photo) for photo in photos} == {content_hash(image)}


def test_the_photo_is_a_new_image_that_does_not_hold_the_file_open(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(_saved(_noise()))
    photo = open_photo(file)
    file.unlink()
    photo.load()
    source = _noise()
    open_photo(source).putpixel((0, 0), (1, 2, 3))
    assert _pixel(source) == _pixel(_noise())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_honoured_once(kind, orientation):
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste("red", (0, 0, 16, 8))  # marks the upper left
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored like this, it must be turned the other way
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turn[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _saved(stored, kind, exif=exif)
    for source in (data, Image.open(io.BytesIO(data))):
        photo = open_photo(source)
        assert photo.size == (32, 16)
        red, *others = (_pixel(photo, x, y)[0] for x, y in ((4, 3), (27, 3), (4, 12), (27, 12)))
        assert red > 200 and max(others) < 60


def test_a_broken_exif_block_does_not_cost_the_photo():
    data = _saved(_noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert open_photo(data).size == (40, 24)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.rint(ramp / 257).astype(np.uint8)
    for source in (_saved(Image.fromarray(ramp)), _saved(Image.fromarray(ramp), "TIFF"), Image.fromarray(ramp), ramp):
        photo = np.asarray(open_photo(source))
        assert np.array_equal(photo[:, :, 0], expected) and np.array_equal(photo[:, :, 2], expected)
    pgm = b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes()
    assert np.array_equal(np.asarray(open_photo(pgm))[:, :, 1], expected)


def test_sixteen_bit_colour_is_scaled_not_clipped():
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 32768, 256) * 2 for _ in range(2))
    png = _png_header(2, 2).replace(struct.pack(">IIBB", 2, 2, 8, 2), struct.pack(">IIBB", 2, 2, 16, 2))
    header = png[16:29]
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    assert _pixel(open_photo(b"\x89PNG\r\n\x1a\n" + body)) == (255, 128, 1)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb_of_about_the_same_colour(kind):
    source = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    assert np.abs(np.array(_pixel(open_photo(_saved(source, kind)), 8, 8)) - (200, 40, 90)).max() < 12


def test_cmyk_with_a_broken_profile_is_still_read():
    source = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    rgb_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # of the wrong colour space
    for profile in (b"nonsense", rgb_profile):
        assert open_photo(_saved(source, "JPEG", icc_profile=profile)).size == (16, 16)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "F"])
def test_every_usual_mode_becomes_rgb(mode):
    image = Image.new("F", (4, 4), 0.5) if mode == "F" else Image.new("L", (4, 4), 100).convert("RGB").convert(
        mode if mode != "I;16" else "L"
    ).convert(mode)  # fmt: skip
    assert open_photo(image).mode == "RGB"


def test_palettes_keep_their_colours_and_their_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert [_pixel(open_photo(_saved(image)), x) for x in (0, 1)] == [(10, 20, 30), (200, 100, 50)]
    data = _saved(image, transparency=0)
    assert [_pixel(open_photo(data), x) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]


def test_transparency_is_laid_over_white_so_that_hidden_colours_stay_hidden():
    rgba = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    rgba.putpixel((2, 0), (9, 8, 7, 255))
    for source in (rgba, _saved(rgba), np.asarray(rgba)):
        photo = open_photo(source)
        assert _pixel(photo, 0) == (255, 255, 255) and _pixel(photo, 2) == (9, 8, 7)
        assert abs(_pixel(photo, 1)[0] - 127) <= 1
    assert _pixel(open_photo(Image.new("LA", (1, 1), (0, 0)))) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = _saved(frames[0], kind, save_all=True, append_images=frames[1:])
    red = _pixel(open_photo(data))
    assert red[0] > 240 and max(red[1:]) < 15


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((2, 2), 0.5), (128, 128, 128)),
        (np.full((2, 2, 1), 1.0, np.float16), (255, 255, 255)),
        (np.full((2, 2, 3), 0.2, np.float32), (51, 51, 51)),
        (np.full((2, 2), 77, np.uint8), (77, 77, 77)),
        (np.full((2, 2), 77, np.int64), (77, 77, 77)),
        (np.ones((2, 2), bool), (255, 255, 255)),
        (np.full((2, 2, 3), 65535, np.uint16), (255, 255, 255)),
        (np.asfortranarray(np.full((2, 2, 3), 9, np.uint8))[:, ::-1], (9, 9, 9)),
    ],
)
def test_arrays_of_every_usual_kind_are_read(array, expected):
    assert _pixel(open_photo(array)) == expected


@pytest.mark.parametrize(
    ("array", "cure"),
    [
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), np.inf), "infinite"),
        (np.full((4, 4, 3), 200.0), "0..1"),
        (np.full((4, 4, 3), -0.5), "0..1"),
        (np.full((4, 4, 3), 300), "0..255"),
        (np.full((4, 4, 3), -1), "0..255"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 0), np.uint8), "no pixels"),
        (np.zeros((4, 4, 0), np.uint8), "[H, W"),
        (np.zeros((3, 64, 64), np.uint8), "channels last"),
        (np.zeros((2, 4, 4, 3), np.uint8), "[H, W"),
        (np.zeros(7, np.uint8), "[H, W"),
        (np.array(3.0), "[H, W"),
        (np.zeros((4, 4), complex), "uint8"),
        (np.array([["a", "b"]]), "uint8"),
        (np.array([[None, None]]), "uint8"),
    ],
)
def test_arrays_that_are_no_picture_are_refused_with_the_cure(array, cure):
    with pytest.raises(BadImage) as caught:
        open_photo(array)
    assert cure in str(caught.value) and "array of shape" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        (b"", "empty"),
        (b"\0" * 500, "zero bytes"),
        (b"<!DOCTYPE html><html>no such page</html>", "web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "export it as PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "export it as PNG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"just some text, not a photo at all", "PNG or JPEG"),
        (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cposix\nsystem\n", "PNG or JPEG"),
        (_png_header(50_000, 50_000), "too large"),
        (_png_header(12_000, 12_000), "too large"),
        (_png_header(50_000, 10), "too large"),
        (_png_header(0, 10), "PNG or JPEG"),
        (_saved(_noise(400, 300))[:9000], "cut short"),
        (_saved(_noise(400, 300), "JPEG")[:9000], "cut short"),
        (_saved(_noise(400, 300), "BMP")[:9000], "cut short"),
        (_saved(_noise(400, 300), "TIFF")[:9000], "cut short"),
        (_saved(_noise(400, 300), "WEBP")[:9000], "PNG or JPEG"),
    ],
)
def test_a_file_that_is_no_readable_image_is_named_with_its_cure(content, cure, tmp_path):
    file = tmp_path / "holiday.jpg"
    file.write_bytes(content)
    with pytest.raises(BadImage) as caught:
        open_photo(file)
    assert cure in str(caught.value) and "holiday.jpg" in str(caught.value)
    with pytest.raises(BadImage):
        open_photo(content)


def test_a_huge_header_is_refused_before_decoding_and_without_pillows_warning():
    with warnings.catch_warnings(), pytest.raises(BadImage, match="too large"):
        warnings.simplefilter("error")
        open_photo(_png_header(9_900, 10_200))
    with pytest.raises(BadImage, match="too large"):
        open_photo(_noise(40, 24), max_pixels=959)
    assert open_photo(_noise(40, 24), max_pixels=960).size == (40, 24)
    with pytest.raises(BadImage, match="too large"):
        open_photo(np.zeros((1, MAX_SIDE + 1), np.uint8))


def test_a_good_image_under_a_wrong_suffix_is_read(tmp_path):
    file = tmp_path / "really-a-png.jpg"
    file.write_bytes(_saved(_noise()))
    assert content_hash(open_photo(file)) == content_hash(_noise())


@pytest.mark.parametrize(
    ("source", "cure"),
    [
        ("no/such/photo.png", "no such file"),
        (".", "folder"),
        ("https://example.org/a.png", "download"),
        ("a\0b.png", "a"),
        ("x" * 5000, "x"),
        ("", "folder"),
        (None, "no photo"),
        (7, "no photo"),
        ([1, 2], "no photo"),
        (b"", "no bytes"),
        (Image.new("RGB", (0, 4)), "no pixels"),
        (Image.new("I", (4, 4), 70_000), "32-bit"),
        (Image.new("F", (4, 4), 70_000.0), "0..1"),
    ],
)
def test_what_is_no_photo_is_refused_with_the_cure(source, cure):
    with pytest.raises(BadImage, match=cure):
        open_photo(source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes: run it on Linux or macOS")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    caught: list[Exception] = []

    def attempt() -> None:
        try:
            open_photo(tmp_path / "pipe.png")
        except BadImage as error:
            caught.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive() and "ordinary file" in str(caught[0])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]), st.data())
def test_damaged_bytes_give_a_photo_or_a_bad_image_and_nothing_else(kind, data):
    content = bytearray(_saved(_noise(), kind))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        photo = open_photo(bytes(content[: data.draw(st.integers(1, len(content)))]))
    except BadImage:
        return
    assert photo.mode == "RGB" and min(photo.size) > 0


def test_the_hash_tells_pixels_sizes_and_modes_apart():
    flat = Image.new("L", (4, 4))
    hashes = {
        content_hash(image) for image in (flat, flat.resize((2, 8)), flat.convert("RGB"), Image.new("L", (4, 4), 1))
    }
    assert len(hashes) == 4 and all(len(each) == 64 for each in hashes)
