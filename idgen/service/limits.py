"""What keeps one client from taking the server away from the others: keys, rates, sizes and times of uploads."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from idgen.service.errors import ApiError, answer

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


class Keys:
    """API keys. Only their digests are kept, and comparing takes the same time whatever was presented."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, presented: str) -> str | None:
        """A name for the key's holder that does not reveal the key, or ``None`` when it is no key."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, in any case
        return digest.hex()[:24] if any(matches) else None


class RateLimit:
    """A token bucket for each client: a minute's worth at once, refilled steadily."""

    def __init__(self, per_minute: float, remembered: int = 10_000) -> None:
        self.per_minute, self._remembered = per_minute, remembered
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, client: str, now: float | None = None) -> float:
        """Take one request: 0 when it may pass, else the seconds until one may."""
        if not self.per_minute:
            return 0.0
        now = time.monotonic() if now is None else now
        capacity = max(1.0, self.per_minute)
        with self._lock:
            level, seen = self._buckets.pop(client, (capacity, now))
            level = min(capacity, level + (now - seen) * self.per_minute / 60)
            wait = 0.0 if level >= 1 else (1 - level) * 60 / self.per_minute
            self._buckets[client] = (level if wait else level - 1, now)
            while len(self._buckets) > self._remembered:
                self._buckets.popitem(last=False)
        return wait


class Guard:
    """ASGI middleware: refuses foreign pages and names, uploads too large or too slow; and answers failures."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int,
        timeout_s: float,
        hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
        check_origin: bool = False,
        keys: Keys | None = None,
    ) -> None:
        """
        Args:
            hosts: names under which the server may be addressed; empty: any.
            origins: origins of other sites that may call.
            check_origin: refuse every other site. Without keys this is all that keeps a page which the user happens to
                visit from using the server on their own machine.
            keys: without one of these nothing sent to the API is read; the routes check again who is calling.
        """
        self.app, self.max_bytes, self.timeout_s = app, max_bytes, timeout_s
        self.hosts = {host.lower() for host in hosts}
        self.origins, self.check_origin = set(origins), check_origin
        self.keys = keys or Keys([])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(headers) or self._stranger(scope, headers)
        if refusal is None and scope["type"] == "http":
            await self._limited(scope, receive, send)
        elif refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await answer(refusal)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, headers: dict[str, str]) -> ApiError | None:
        host = headers.get("host", "")
        if self.hosts and _name(host) not in self.hosts:
            return ApiError(421, "this server does not answer to that host name.", "wrong_host")
        origin = headers.get("origin")
        if self.check_origin and origin and origin not in self.origins and origin.split("://")[-1] != host:
            return ApiError(403, "pages of other sites may not call this server.", "foreign_origin")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.max_bytes:
            return self._too_large()
        return None

    def _stranger(self, scope: Scope, headers: dict[str, str]) -> ApiError | None:
        if not self.keys or scope.get("method") != "POST" or not scope["path"].startswith("/v1/"):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return None if scheme.lower() == "bearer" and self.keys.owner(key.strip()) else no_key(close=True)

    def _too_large(self) -> ApiError:
        message = f"the request is too large; at most {self.max_bytes:,} bytes are read."
        # The rest is not read, so the connection cannot be used again.
        return ApiError(413, message, "too_large", headers={"connection": "close"})

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        end, read, complete, started = time.monotonic() + self.timeout_s, 0, False, False
        refused: ApiError | None = None

        async def limited_receive() -> Message:
            nonlocal read, complete, refused
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                text = f"the request did not arrive within {self.timeout_s:g} s."
                refused = ApiError(408, text, "upload_timeout", headers={"connection": "close"})
                raise _Refused from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > self.max_bytes:
                refused = self._too_large()
                raise _Refused
            return message

        async def noting_send(message: Message) -> None:
            nonlocal started
            if refused is not None and not started:
                return  # whatever the application says about the exception; the refusal below is the answer
            started = True
            await send(message)

        failure: Exception | None = None
        try:
            await self.app(scope, limited_receive, noting_send)
        except Exception as error:  # answered here, so that the connection lives on
            failure = error
        failure = refused or failure
        if failure is not None and not started:
            await answer(failure)(scope, receive, send)
        elif failure is not None and failure is not refused:
            raise failure


def no_key(close: bool = False) -> ApiError:
    """The answer to strangers. ``close``: end the connection, for the body was not read."""
    headers = {"www-authenticate": "Bearer"} | ({"connection": "close"} if close else {})
    message = "give an API key of this server: Authorization: Bearer KEY."
    return ApiError(401, message, "invalid_api_key", headers=headers)


class _Refused(Exception):
    """The upload broke a limit; whoever catches it on the way must not answer for us."""


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:  # brackets that are no IPv6 address
        return ""
