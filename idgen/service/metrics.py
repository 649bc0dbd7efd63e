"""Prometheus metrics: of the engine, read when asked for, and of the HTTP requests, counted as they pass."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from idgen.engine import Engine
from idgen.service.state import Service

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
IMAGES = (1, 2, 4, 8, 16, 32, 64)


class EngineCollector(Collector):
    """The engine's own numbers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        yield GaugeMetricFamily("idgen_queue_length", "Requests that wait.", stats.queued)
        yield GaugeMetricFamily("idgen_queue_size", "Requests that may wait.", self.engine.queue_size)
        yield GaugeMetricFamily("idgen_running", "Requests that are denoised or decoded now.", stats.running)
        jobs = CounterMetricFamily("idgen_jobs", "Requests by how they ended.", labels=["state"])
        for state in ("served", "failed", "cancelled", "rejected"):
            jobs.add_metric([state], getattr(stats, state))
        yield jobs
        yield CounterMetricFamily("idgen_images", "Images made.", stats.images)
        yield CounterMetricFamily("idgen_busy_seconds", "Seconds in which the engine worked.", stats.busy_s)
        sizes = stats.batch_sizes
        buckets = [(str(most), float(sum(c for size, c in sizes.items() if size <= most))) for most in IMAGES]
        runs, images = float(sum(sizes.values())), float(sum(size * count for size, count in sizes.items()))
        yield HistogramMetricFamily(
            "idgen_batch_images", "Images in one sampler run.", [*buckets, ("+Inf", runs)], images
        )


class Observed:
    """ASGI middleware: counts requests and their seconds by route, and gives each an ``x-request-id``."""

    def __init__(self, app: ASGIApp, *, registry: CollectorRegistry, service: Service) -> None:
        self.app, self.service = app, service
        labels = ("route", "method", "status")
        self._requests = Counter("idgen_http_requests", "HTTP requests.", labels, registry=registry)
        self._seconds = Histogram(
            "idgen_http_seconds", "Seconds to the end of the answer.", ("route",), buckets=SECONDS, registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # as nginx counts those whose client left first

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", uuid.uuid4().hex.encode())]
            await send(message)

        owed = scope["path"].startswith("/v1/")
        self.service.open_requests += owed
        try:
            await self.app(scope, receive, noting_send)
        finally:
            self.service.open_requests -= owed
            # The template and a known method, never the client's own text: labels must stay few.
            route = getattr(scope.get("route"), "path", None) or "other"
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
            self._requests.labels(route, method, str(status)).inc()
            self._seconds.labels(route).observe(time.perf_counter() - started)
