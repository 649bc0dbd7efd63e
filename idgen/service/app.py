"""The ASGI application: routes, middleware, start and end."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from idgen import __version__
from idgen.engine import Engine
from idgen.errors import IdgenError
from idgen.service import openai_api, people, portraits
from idgen.service.errors import ApiError, add_handlers
from idgen.service.identities import IdentityShelf
from idgen.service.limits import LOOPBACK_NAMES, Guard, Keys, RateLimit
from idgen.service.metrics import EngineCollector, Observed
from idgen.service.settings import ServiceSettings
from idgen.service.state import Service, ServiceOf, caller, service_of
from idgen.speed import choose_levers

log = logging.getLogger("idgen.service")

DESCRIPTION = """Identity-preserving portraits: one photo and a prompt in, portraits out that stay recognisably that
person.

The OpenAI routes work with the official clients; the others are idgen's own. Keys go into `Authorization: Bearer KEY`.
"""


def make_engine(settings: ServiceSettings) -> Engine:
    """The engine that the settings describe."""
    load = {name: getattr(settings, name) for name in ("base", "device", "dtype", "offload")}
    load["speed"] = choose_levers(settings.speed, settings.few_step)
    limits = {name: getattr(settings, name) for name in ("queue_size", "max_batch", "batching")}
    return Engine(load, **limits, keep=settings.pipelines or ("auto",))


def create_app(settings: ServiceSettings | None = None, engine: Engine | None = None) -> FastAPI:
    """The service as an ASGI application.

    Args:
        engine: to serve; closed when the application ends. ``None`` makes one from the settings.
    Raises:
        BadRequest: the settings contradict themselves, such as a public address without a key.
    """
    settings = settings or ServiceSettings.read()
    settings.check_bind()
    keys = Keys(settings.keys())
    service = Service(
        settings=settings,
        engine=engine or make_engine(settings),
        keys=keys,
        rates=RateLimit(settings.rate_limit),
        shelf=IdentityShelf(settings.identities_folder, settings.max_identities),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        threading.Thread(target=_load, args=(service,), name="idgen-load", daemon=True).start()
        yield
        # Whoever waited for an answer has got it by now; what is left nobody waits for.
        await asyncio.to_thread(service.engine.close, False)

    app = FastAPI(title="idgen", version=__version__, description=DESCRIPTION, lifespan=lifespan)
    app.state.service = service
    registry = CollectorRegistry()
    registry.register(EngineCollector(service.engine))
    _add_middleware(app, service, registry)
    add_handlers(app)
    for module in (openai_api, portraits, people):
        app.include_router(module.router)
    _add_operations(app, registry, public=settings.metrics_public)
    if settings.demo:
        _add_not_found(app)
        return _mount_demo(app, service) or app
    return app


def _load(service: Service) -> None:
    try:
        service.load()
    except IdgenError as error:
        log.error("the models could not be loaded: %s", error)
    except BaseException as error:  # also a panic of a library: else the service would say for ever that it loads
        service.problem = "the models could not be loaded; the log says why."
        log.exception("the models could not be loaded: %s", error)


def _add_middleware(app: FastAPI, service: Service, registry: CollectorRegistry) -> None:
    """Added last runs first."""
    settings, open_to_all = service.settings, not service.keys
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    hosts = settings.trusted_hosts or (LOOPBACK_NAMES if open_to_all else ())
    app.add_middleware(
        Guard,
        max_bytes=settings.max_upload_bytes,
        timeout_s=settings.upload_timeout_s,
        hosts=hosts,
        origins=settings.cors_origins,
        check_origin=open_to_all,
        keys=service.keys,
    )
    app.add_middleware(Observed, registry=registry, service=service)


def _add_operations(app: FastAPI, registry: CollectorRegistry, public: bool) -> None:
    @app.get("/healthz", tags=["Operations"])
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["Operations"], responses={503: {"description": "Not yet, or not now."}})
    async def readyz(service: ServiceOf) -> Response:
        """The models are loaded and the queue has room."""
        stats = service.engine.stats()
        room = stats.queued < service.engine.queue_size
        ready = service.ready.is_set() and room
        reason = None if ready else service.problem or ("the queue is full" if not room else "loading models")
        return JSONResponse({"ready": ready, "reason": reason, "queued": stats.queued}, 200 if ready else 503)

    dependencies = [] if public else [Depends(caller)]

    @app.get("/metrics", tags=["Operations"], dependencies=dependencies)
    def metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    # No key: the name cannot be guessed, and clients fetch the URL as it is.
    @app.get("/v1/files/{name}", name="picture", tags=["OpenAI"], responses=openai_api.ERRORS)
    def picture(name: str, service: Annotated[Service, Depends(service_of)]) -> Response:
        """A picture that was asked for with `response_format` `url`; it is kept for an hour."""
        found = service.pictures.get(name)
        if found is None:
            raise ApiError(404, "there is no such picture, or not any more.", "not_found", "name")
        headers = {"cache-control": "private, max-age=3600", "x-content-type-options": "nosniff"}
        return Response(found[0], media_type=f"image/{found[1]}", headers=headers)


def _add_not_found(app: FastAPI) -> None:
    """What is no route of the API, the demo at ``/`` would answer in a shape that clients cannot read."""

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    def nothing(request: Request) -> None:
        raise ApiError(404, f"there is no {request.method} {request.url.path}; see /docs.", "not_found")


def _mount_demo(app: FastAPI, service: Service) -> FastAPI | None:
    """The web demo at ``/``; with keys behind a login whose password is a key."""
    try:
        import gradio

        from idgen.demo.app import build, look
        from idgen.demo.limits import Limits
    except ImportError as error:
        log.warning("the demo is not served: %s", error)
        return None
    keys, settings = service.keys, service.settings
    options = {**look(), "max_file_size": settings.max_upload_bytes, "show_error": False}
    page = build(
        service.engine,
        base=settings.base,
        ready=settings.pipelines or None,
        limits=Limits(service.check, settings.deadline_s, settings.max_photos, settings.max_pixels),
    )
    return gradio.mount_gradio_app(
        app,
        page,
        path="/",
        auth=(lambda _, password: keys.owner(password) is not None) if keys else None,
        auth_message="Any name, and an API key of this server as the password.",
        **options,
    )
