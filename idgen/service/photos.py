"""Photos of strangers: uploads, base64 and, where the operator allows it, URLs. Never a path on this machine."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from urllib.parse import urlsplit

from PIL import Image

from idgen.errors import BadImage
from idgen.images import open_photo
from idgen.service.errors import ApiError
from idgen.service.settings import ServiceSettings

T = TypeVar("T")

FETCH_TIMEOUT_S = 15.0
_decoders = ThreadPoolExecutor(4, thread_name_prefix="idgen-decode")
"""Few, for each may hold a photo of ``max_pixels``."""


async def decoding(work: Callable[[], T]) -> T:
    """Do work that decodes photos beside the loop, a few at a time."""
    return await asyncio.get_running_loop().run_in_executor(_decoders, work)


async def checked(data: bytes, settings: ServiceSettings, param: str) -> bytes:
    """The bytes of a photo that can be decoded and is not too large.

    They stay bytes: a queue of decoded photos would take gigabytes.

    Raises:
        ApiError: it is no such photo; names the field.
    """
    try:
        await decoding(lambda: open_photo(data, max_pixels=settings.max_pixels))
    except BadImage as error:
        raise ApiError(400, str(error), "bad_image", param) from None
    return data


async def from_text(text: str, settings: ServiceSettings, param: str) -> bytes:
    """A photo given as base64, as a data URL or as a URL on a host in ``fetch_hosts``.

    Raises:
        ApiError: it is none of these, the host is not allowed, or it is no photo.
    """
    if text.startswith(("http://", "https://")):
        return await checked(await _fetch(text, settings, param), settings, param)
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise ApiError(400, "a data URL must be base64-encoded.", "bad_image", param)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "a photo is given as base64 of an image file.", "bad_image", param) from None
    return await checked(data, settings, param)


async def from_texts(texts: Sequence[str], settings: ServiceSettings, param: str) -> list[bytes]:
    """Several of :func:`from_text`.

    Raises:
        ApiError: as there, or there are more than ``max_photos``.
    """
    check_count(len(texts), settings, param)
    return [await from_text(text, settings, param) for text in texts]


def check_count(count: int, settings: ServiceSettings, param: str) -> None:
    """Refuse more photos than one request may have."""
    if count > settings.max_photos:
        raise ApiError(400, f"{count} photos; at most {settings.max_photos} are taken.", "too_many_photos", param)


async def mask_from_alpha(data: bytes, settings: ServiceSettings, param: str = "mask") -> Image.Image:
    """idgen's mask (white may change) from OpenAI's (fully transparent may change).

    Raises:
        ApiError: it is no photo, or has no transparency.
    """
    await checked(data, settings, param)

    def convert() -> Image.Image | None:
        with Image.open(io.BytesIO(data)) as image:
            if not image.has_transparency_data:
                return None
            return image.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha == 0 else 0)

    mask = await asyncio.to_thread(convert)
    if mask is None:
        raise ApiError(400, "a mask needs transparent areas: they say what may change.", "bad_image", param)
    return mask


async def _fetch(url: str, settings: ServiceSettings, param: str) -> bytes:
    import httpx

    allowed = {host.lower() for host in settings.fetch_hosts}
    try:
        parts = urlsplit(url)
        place = parts.netloc.lower()
    except ValueError:
        place = ""
    if not place or place not in allowed:  # a user name or another port makes it another place
        raise ApiError(400, "this server does not fetch photos from there; upload the file.", "url_refused", param)
    try:
        return await asyncio.wait_for(_download(url, settings.max_upload_bytes, param), FETCH_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL, asyncio.TimeoutError) as error:
        kind = type(error).__name__
        raise ApiError(400, f"the photo could not be fetched ({kind}).", "url_failed", param) from None


async def _download(url: str, limit: int, param: str) -> bytes:
    import httpx

    # No redirects, which could lead to any host, and no proxies from the environment.
    async with (
        httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=FETCH_TIMEOUT_S) as client,
        client.stream("GET", url) as response,
    ):
        if response.status_code != 200:
            message = f"the photo could not be fetched: status {response.status_code}."
            raise ApiError(400, message, "url_failed", param)
        data = bytearray()
        async for block in response.aiter_bytes():
            data += block
            if len(data) > limit:
                raise ApiError(400, f"the photo has more than {limit:,} bytes.", "too_large", param)
    return bytes(data)
