"""The HTTP service on a Ray Serve cluster: the same application and engine in each of several replicas.

``serve run idgen.serve_cluster:app replicas=2 base=mini`` runs it, as does a Serve config file with
``import_path: idgen.serve_cluster:app``; :func:`start` does it from Python. Each replica has its own models, queue and
rate limits; Serve sends a request to the less busy of two. Needs ``pip install "idgen[cluster]"``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from idgen.errors import BadRequest
from idgen.service.settings import ServiceSettings

NAME = "idgen"


def deployment(settings: ServiceSettings, *, replicas: int = 1, gpus: float = 0, cpus: float = 1) -> Any:
    """The service as a Serve application, ready for ``ray.serve.run``.

    Args:
        settings: as for ``idgen serve``; host and port are the cluster's business, and there is no demo, whose sessions
            would have to stay on one replica. ``identities_folder`` must be a folder that all replicas share.
        replicas: how many, at least 1.
        gpus, cpus: of each replica; half a GPU lets two share one.
    Raises:
        BadRequest: Ray is not installed, or an argument is out of bounds.
    """
    try:
        from ray import serve
    except ImportError:
        raise BadRequest('a cluster needs Ray: pip install "idgen[serve,cluster]"') from None
    if replicas < 1:
        raise BadRequest(f"replicas is {replicas}; it must be at least 1.", "replicas")
    # Pictures by URL would lie in the memory of one replica only, and the next request may go to another.
    own = settings.model_copy(update={"demo": False, "picture_urls": False})

    def build() -> Any:
        from idgen.service.app import create_app, make_engine

        return create_app(own, make_engine(own))

    options = {
        "num_replicas": replicas,
        # Enough for the engine to see its queue full and answer 429 itself, with the time to come back.
        "max_ongoing_requests": own.queue_size + 2 * own.max_batch,
        "graceful_shutdown_timeout_s": own.grace_s,
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus},
    }
    made: Any = serve.deployment(serve.ingress(build)())
    return made.options(name=NAME, **options).bind()


def app(args: dict[str, Any]) -> Any:
    """For ``serve run`` and Serve config files: ``replicas``, ``gpus``, ``cpus``, ``config`` (a TOML file), settings.

    Raises:
        BadRequest: as :func:`deployment` and :meth:`ServiceSettings.read`.
    """
    from pathlib import Path

    args = dict(args)
    given = {name: kind(args.pop(name)) for name, kind in _ARGUMENTS.items() if name in args}
    config = args.pop("config", None)
    settings = ServiceSettings.read(None if config is None else Path(config), **args)
    return deployment(settings, **given)


_ARGUMENTS: dict[str, Callable[[Any], Any]] = {"replicas": int, "gpus": float, "cpus": float}


def start(settings: ServiceSettings, *, wait: bool = False, **options: Any) -> str:
    """Run the service on the cluster that Ray is connected to, or on one started on this machine.

    Args:
        wait: return only when interrupted.
        options: as for :func:`deployment`.
    Returns:
        Its address.
    Raises:
        BadRequest: as :func:`deployment`; or the host is public and there is no key.
    """
    settings.check_bind()
    made = deployment(settings, **options)
    from ray import serve

    serve.start(http_options={"host": settings.host, "port": settings.port})
    serve.run(made, name=NAME, route_prefix="/", blocking=wait)
    return f"http://{settings.host}:{settings.port}"
