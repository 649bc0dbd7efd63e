"""Photos in: whatever a user hands in becomes an upright RGB image, or a `BadImage` that names the cure.

Nothing here trusts its input. The size in the header is checked before a pixel is decoded, only raster formats are
tried (Pillow would otherwise start Ghostscript for an EPS file), and whatever a decoder throws becomes a `BadImage`.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from idgen.errors import BadImage

PhotoSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray"

MAX_PIXELS = 100_000_000
MAX_SIDE = 32_000  # OpenCV's warpAffine, which cuts the aligned crops, refuses sides of 32,768 and more

# HEIF and HEIC are there when the user has installed and registered pillow-heif.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "HEIF")

# EXIF tag 0x0112 (EXIF 2.32, 4.6.4): how the stored image must be turned to stand upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# `warnings.catch_warnings` swaps a list that all threads share, so only one thread at a time may do it here.
_opening = threading.Lock()


def open_photo(source: PhotoSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return `source` as an upright RGB image of 8 bits a channel, with nothing left to decode.

    source: a file's path, the bytes of an image file, a PIL image, or an array. Arrays are [H, W], [H, W, 1],
        [H, W, 3] (RGB) or [H, W, 4] (RGBA): bool, uint8, uint16 (0..65535), another integer type within 0..255, or
        floats within 0..1.
    max_pixels: width x height above which the photo is refused, before it is decoded.

    EXIF rotation is applied. Of an animation the first frame is taken. 16-bit grey is scaled to 8 (v / 257), not
    clipped. Transparency is laid over white: cut-out portraits are made for white paper, and to drop the alpha
    channel instead would uncover whatever colours the editor left below it. CMYK goes through its embedded profile
    where there is one. The content decides the format, not the suffix: a PNG called `.jpg` is read.

    Raises `BadImage`, naming the input and the cure, for everything else. Pillow has a ceiling of its own
    (`PIL.Image.MAX_IMAGE_PIXELS`, about 179 million pixels); a larger `max_pixels` has effect only if that is raised.
    """
    name = describe(source)
    if isinstance(source, np.ndarray):
        if source.ndim > 1:
            _check_size(source.shape[1], source.shape[0], name, max_pixels)
        return _flatten(_from_array(source, name), name)
    if isinstance(source, Image.Image):
        return _finish(source, name, max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        if not data:
            raise BadImage(f"{name}: there are no bytes to read. Hand in the content of an image file.")
        with _open(io.BytesIO(data), name, data[:64]) as image:
            return _finish(image, name, max_pixels)
    if not isinstance(source, str | os.PathLike):
        raise BadImage(f"{name} is no photo. Hand in a path, the bytes of an image file, a PIL image or a numpy array.")
    path, start = _readable_file(source, name)
    with _open(path, name, start) as image:
        return _finish(image, name, max_pixels)


def content_hash(image: Image.Image) -> str:
    """Return the SHA-256 (64 hex digits) of an image's mode, size and pixels: equal pictures, equal hash."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def describe(source: object) -> str:
    """Name a photo for a message: its path if it has one, otherwise what it is and how large."""
    if isinstance(source, str):
        return source if len(source) < 300 else f"{source[:300]}..."
    if isinstance(source, os.PathLike):
        return describe(os.fsdecode(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return f"image of {len(source):,} bytes"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"{source.width} x {source.height} image"
    if isinstance(source, np.ndarray):
        return f"array of shape {source.shape}"
    return f"object of type {type(source).__name__}"


def _readable_file(source: str | os.PathLike[str], name: str) -> tuple[Path, bytes]:
    """Check that `source` is an ordinary, non-empty file (a pipe would block for ever); return it and its start."""
    if "://" in name:
        raise BadImage(f"{name} is a web address. idgen does not fetch photos: download it and hand in the file.")
    try:
        path = Path(source)
        if path.is_dir():
            raise BadImage(f"{name} is a folder. Hand in one image file.")
        if not path.exists():
            raise BadImage(f"{name}: there is no such file. Check the path (current folder: {Path.cwd()}).")
        if not path.is_file():
            raise BadImage(f"{name} is not an ordinary file. Hand in an image file.")
        with path.open("rb") as stream:
            start = stream.read(64)
    except (OSError, ValueError, TypeError) as error:  # ValueError: a null byte in the path
        raise BadImage(f"{name} cannot be read ({error}). Check the path and its permissions.") from error
    if not start:
        raise BadImage(f"{name} is empty (0 bytes). Copy or download it again.")
    return path, start


def _open(file: Path | io.BytesIO, name: str, start: bytes) -> Image.Image:
    """Read the header only."""
    Image.init()
    formats = [each for each in _FORMATS if each in Image.OPEN]
    try:
        with _opening, warnings.catch_warnings():
            # Pillow warns from 89 million pixels on, in words about attacks; `_check_size` has the clear message.
            warnings.simplefilter("ignore")
            return Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        raise BadImage(f"{name} is too large ({error}). Scale it down to a few thousand pixels a side.") from error
    except Exception as error:  # a decoder fed with hostile bytes may throw anything
        raise BadImage(f"{name} is not an image that can be read: {_guess(start)}.") from error


def _guess(start: bytes) -> str:
    """Say what a file that is no image probably is."""
    text = start.lstrip().lower()
    if not start.strip(b"\0"):
        return "it holds only zero bytes; copy or download it again"
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"):
        return "it is a HEIC photo; save it as JPEG, or `pip install pillow-heif` and register its opener"
    if text.startswith((b"<!doctype", b"<html")):
        return "it is a web page; download the image itself"
    if text.startswith((b"<svg", b"<?xml", b"%!ps", b"%pdf")):
        return "it is a vector drawing or document; export it as PNG"
    return "its content is no known or no intact image format; save it as PNG or JPEG, whatever its suffix says"


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadImage(f"{name} has no pixels ({width} x {height}). Hand in an image of at least 1 x 1.")
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise BadImage(
            f"{name} is too large: {width:,} x {height:,} pixels; at most {max_pixels:,} pixels and {MAX_SIDE:,} a "
            "side are read. Scale it down: a portrait needs no more than a few thousand pixels a side."
        )


def _finish(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Decode one frame, convert it to RGB and turn it upright."""
    _check_size(image.width, image.height, name, max_pixels)
    try:
        image.load()  # of an animation in a file the first frame; of a PIL image the frame its owner has chosen
    except Exception as error:  # truncated or broken: decoders throw OSError, ValueError, struct.error, EOFError ...
        raise BadImage(f"{name} is damaged or cut short ({error}). Copy or download it again.") from error
    rgb = _flatten(image, name)
    try:
        # Only after load(): Pillow turns TIFFs itself and removes the tag, and a PNG may carry it after its pixels.
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # the picture is sound, only its metadata is not: show it as stored
        orientation = 1
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return rgb.transpose(method) if method is not None else rgb


def _flatten(image: Image.Image, name: str) -> Image.Image:
    """Convert any mode to RGB; always a new image, without the source's metadata."""
    try:
        if image.mode.startswith("I;16"):
            image = _from_array(np.asarray(image).astype(np.uint16), name)
        elif image.mode == "I":  # Pillow reads 16-bit PGM as 32-bit integers of 0..65535
            values = np.asarray(image)
            if values.min() < 0 or values.max() > 65535:
                raise BadImage(f"{name} has 32-bit integer pixels of unknown range. Save it with 8 or 16 bits.")
            image = _from_array(values.astype(np.uint16), name)
        elif image.mode == "F":
            image = _from_array(np.asarray(image), name)
        elif image.mode == "CMYK" and image.info.get("icc_profile"):
            image = _from_profile(image)
        if image.mode == "La":
            image = image.convert("LA")
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            paper = Image.new("RGBA", rgba.size, "white")
            image = Image.alpha_composite(paper, rgba)
        rgb = image.convert("RGB") if image.mode != "RGB" else image.copy()
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"{name} has colours that cannot be read ({error}). Save it as an sRGB PNG or JPEG.") from error
    rgb.info = {}
    return rgb


def _from_profile(image: Image.Image) -> Image.Image:
    """Convert CMYK to sRGB as its printer's profile says; plainly when that profile is broken."""
    from PIL import ImageCms

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return converted or image


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    """Return an L, RGB or RGBA image of an array's values, see `open_photo`."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        swapped = " Put the channels last: array.transpose(1, 2, 0)." if array.ndim == 3 else ""
        raise BadImage(f"{name}: an image is [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].{swapped}")
    if array.size == 0:
        raise BadImage(f"{name} has no pixels. Hand in an image of at least 1 x 1.")
    kind = array.dtype.kind
    if kind == "f":
        if not np.isfinite(array).all():
            raise BadImage(f"{name} has values that are NaN or infinite. Repair what made it.")
        low, high = float(array.min()), float(array.max())
        if low < -1e-3 or high > 1 + 1e-3:
            raise BadImage(f"{name}: floats must lie within 0..1, these span {low:g}..{high:g}. Rescale, or use uint8.")
        values = np.rint(np.clip(array.astype(np.float32), 0, 1) * 255)
    elif kind == "b":
        values = array * 255
    elif array.dtype == np.uint16:
        values = np.rint(array / np.float32(257))
    elif kind in "iu":
        if array.min() < 0 or array.max() > 255:
            raise BadImage(f"{name}: {array.dtype} values must lie within 0..255. Rescale, or use uint8 or uint16.")
        values = array
    else:
        raise BadImage(f"{name} holds {array.dtype} values. Hand in uint8, uint16 or floats within 0..1.")
    return Image.fromarray(np.ascontiguousarray(values.astype(np.uint8)))
