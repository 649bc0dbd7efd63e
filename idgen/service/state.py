"""What all routes share, and who is calling."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from idgen.engine import Engine, Job
from idgen.errors import BadRequest, IdgenError, WeightsMissing
from idgen.faces import FaceExtractor
from idgen.registry import method, methods_of, pipelines
from idgen.request import Request as Order
from idgen.service.errors import ApiError
from idgen.service.identities import IdentityShelf
from idgen.service.limits import Keys, RateLimit, no_key
from idgen.service.pictures import Pictures
from idgen.service.settings import ServiceSettings

EVERYBODY = "everybody"
"""The owner of identities on a server without keys."""


@dataclass
class Service:
    """One service: its settings, its engine and its stores."""

    settings: ServiceSettings
    engine: Engine
    keys: Keys
    rates: RateLimit
    shelf: IdentityShelf
    pictures: Pictures = field(default_factory=Pictures)
    ready: threading.Event = field(default_factory=threading.Event)
    open_requests: int = 0
    """requests to the API that have no whole answer yet"""
    problem: str | None = None
    """why the models could not be loaded"""
    looking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    """at most so many photos are searched for faces at once, beside the engine's own"""

    def names(self) -> list[str]:
        """The pipelines that clients may use."""
        return list(self.settings.pipelines) or [info.name for info in pipelines() if info.available]

    def resolve(self, model: str | None, has_person: bool, param: str) -> str:
        """The pipeline for the name a client gave; without one the best for a person, or plain text-to-image.

        Raises:
            ApiError: 404, there is no such pipeline here.
        """
        name = self.settings.aliases.get(model, model) if model else None
        if name is None or name == "auto":
            if has_person or name == "auto":
                return self.settings.pipelines[0] if self.settings.pipelines else "auto"
            name = "text-to-image"
        allowed = self.names()
        if name in allowed:
            return name
        try:
            parts = [each.name for each in methods_of(name)]
        except BadRequest as error:
            raise ApiError(404, str(error), "model_not_found", param) from None
        for part in parts:
            if part not in allowed:
                message = f"{part!r} is not served here; there are {', '.join(allowed) or 'none'}."
                raise ApiError(404, message, "model_not_found", param)
        return name

    def order(self, fields: dict[str, Any]) -> Order:
        """A validated request within this server's bounds.

        Raises:
            BadRequest: names the field.
        """
        order = Order.create(**{name: value for name, value in fields.items() if value is not None})
        self.check(order)
        return order

    def check(self, order: Order) -> None:
        """Hold a request to this server's bounds, wherever it comes from. Decodes a pose that may decide the size.

        Raises:
            BadRequest: names the field. BadImage: the pose cannot be read.
        """
        bounds = {"n": self.settings.max_n, "steps": self.settings.max_steps}
        bounds |= {"width": self.settings.max_side, "height": self.settings.max_side}
        for name, most in bounds.items():
            if (getattr(order, name) or 0) > most:
                raise BadRequest(f"{name}: this server allows at most {most}.", name)
        drawn = order.drawn_size()
        if drawn is not None and max(drawn) > self.settings.max_side:
            raise BadRequest(
                f"pose: without a size the drawing decides it, {drawn[0]} x {drawn[1]} pixels, and this server allows "
                f"at most {self.settings.max_side} a side: give width and height.",
                "pose",
            )

    def submit(self, order: Order, deadline: float | None, preview_every: int = 0) -> Job:
        """Queue a request; the server's deadline holds where the client's is longer."""
        limit = self.settings.deadline_s
        return self.engine.submit(order, deadline=min(deadline or limit, limit), preview_every=preview_every)

    def extractors(self) -> list[FaceExtractor]:
        """One for each recogniser that the pipelines served here were trained on, as far as their weights are here.

        An embedding by one recogniser means nothing to the pipelines of another, so a person is enrolled with all.
        """
        from idgen.api import default_extractor, extractor_for

        loaded = self.engine.loaded()
        found = {p.extractor.recogniser_name: p.extractor for p in loaded if p.extractor is not None}
        for name in [part for given in self.names() for part in given.split("+")] if loaded else []:
            if name != "auto" and method(name).recogniser:
                with contextlib.suppress(WeightsMissing):
                    extractor = extractor_for(method(name), loaded[0].backbone)
                    found.setdefault(extractor.recogniser_name, extractor)
        return list(found.values()) or [default_extractor()]

    def load(self) -> None:
        """Load the first pipeline and say so, or say why not."""
        try:
            if self.settings.preload:
                self.engine.pipeline(self.settings.pipelines[0] if self.settings.pipelines else "auto")
            self.ready.set()
        except IdgenError as error:
            self.problem = str(error)
            raise


def service_of(request: Request) -> Service:
    """The service that an application belongs to."""
    service: Service = request.app.state.service
    return service


_bearer = HTTPBearer(auto_error=False, description="An API key of this server; not needed when it has none.")


def caller(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None
) -> str:
    """Who is calling: the owner of what they make. Holds them to their rate.

    Raises:
        ApiError: 401 without a valid key, 429 above the rate.
    """
    service = service_of(request)
    address = request.client.host if request.client else "unknown"
    owner, client = EVERYBODY, f"address {address}"
    if service.keys:
        found = service.keys.owner(credentials.credentials) if credentials is not None else None
        if found is None:
            raise no_key()
        owner = client = found
    if wait := service.rates.take(client):
        seconds = str(math.ceil(wait))
        message = f"more than {service.rates.per_minute:g} requests a minute; try again in {seconds} s."
        raise ApiError(429, message, "rate_limit_exceeded", headers={"retry-after": seconds})
    return owner


def orderer(request: Request, owner: Annotated[str, Depends(caller)]) -> str:
    """Like :func:`caller`, for routes that queue work: a full queue refuses before photos are decoded."""
    service_of(request).engine.check_room()
    return owner


Caller = Annotated[str, Depends(caller)]
Orderer = Annotated[str, Depends(orderer)]
ServiceOf = Annotated[Service, Depends(service_of)]
