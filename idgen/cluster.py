"""A batch on a Ray cluster: Ray Data's ``map_batches`` over a pool of actors, each with its own resident models.

The driver plans, and it alone writes the results, so that a lost worker's rows, which Ray renders again elsewhere,
are in them once. Pictures for a bucket are written by the workers; those for a local folder travel to the driver,
because a folder of that name on another machine is another folder.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

from idgen.batch.plan import Plan, Unit
from idgen.batch.render import AUTO, Renderer
from idgen.batch.results import Outcome
from idgen.batch.storage import RemoteFolder, is_url
from idgen.errors import BadRequest, IdgenError

log = logging.getLogger("idgen")


class Worker:
    """An actor of the pool: renders one window of units at a time."""

    def __init__(self, settings: dict[str, Any], batch_size: int | None, out: str) -> None:
        self.renderer = Renderer(settings, batch_size)
        self.folder = RemoteFolder(out) if is_url(out) else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """batch: `units` [1], a JSON list of units. Returns a row for each: `about` (JSON) and `data` (the picture)."""
        units = [Unit(**fields) for fields in json.loads(batch["units"][0])]
        about, data = [], []
        for outcome in self.renderer.render(units):
            picture = b"" if outcome.error is not None else outcome.encoded()
            if self.folder is not None and picture:
                self.folder.write(outcome.unit.file, picture)
                picture = b""
            about.append(_pack(outcome))
            data.append(picture)
        return {"about": about, "data": data}


def _pack(outcome: Outcome) -> str:
    kept = ("seconds", "likeness", "note", "error", "unexpected")
    return json.dumps({"unit": outcome.unit.to_json(), **{name: getattr(outcome, name) for name in kept}})


def _unpack(about: str, data: bytes) -> Outcome:
    fields = json.loads(about)
    return Outcome(unit=Unit.from_json(fields.pop("unit")), data=bytes(data), **fields)


def render(
    plan: Plan,
    out: str,
    settings: dict[str, Any],
    batch_size: int | None,
    stopped: Callable[[], bool],
    *,
    address: str = "auto",
    workers: int | None = None,
) -> Iterator[Outcome]:
    """Render all that is pending in the plan on a cluster; yield outcomes as they arrive, each unit once.

    address: ``auto`` for the cluster of this machine (or of ``RAY_ADDRESS``), started if there is none; or a cluster's
    own. workers: actors, each with a GPU where the cluster has any, else with a CPU.
    Raises `BadRequest` when Ray is not installed or no cluster answers; `IdgenError` when the cluster is lost.
    """
    ray = _connect(address)
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    size = max(1, min(workers or gpus or cpus, gpus or cpus))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    windows = [{"units": _to_json(window)} for window in plan.windows(batch_size or AUTO)]
    if not windows:
        return
    # A worker that is lost (a spot machine, a kill, the kernel's out-of-memory killer) comes back, and Ray Data gives
    # its windows out again, without end. Errors of rows never get there: the renderer turns them into outcomes.
    made = ray.data.from_items(windows, override_num_blocks=len(windows)).map_batches(
        Worker,
        fn_constructor_args=(settings, batch_size, out),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        **({"num_gpus": 1} if gpus else {"num_cpus": 1}),
    )
    seen: set[tuple[int, int]] = set()
    try:
        for row in made.iter_rows():
            outcome = _unpack(row["about"], row["data"])
            key = (outcome.unit.row, outcome.unit.image)
            if key not in seen:
                seen.add(key)
                yield outcome
            if stopped():
                return
    except IdgenError:
        raise
    except Exception as error:
        log.debug("Ray", exc_info=error)
        raise IdgenError(
            f"the Ray job ended early ({type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}). All that "
            "arrived is recorded; run the same command again."
        ) from None


def _to_json(window: list[Unit]) -> str:
    return json.dumps([vars(unit) for unit in window])


def _connect(address: str) -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BadRequest(f"--ray needs Ray ({error}): pip install 'idgen[cluster]'", "ray") from None
    if not ray.is_initialized():
        if address != "auto":
            _knock(address)  # Ray itself would try for minutes
        try:
            ray.init(address=None if address == "auto" else address, log_to_driver=False, logging_level=logging.WARNING)
        except Exception as error:
            raise BadRequest(f"Ray cannot use {address} ({error}). {_CURE}", "ray") from None
    return ray


_CURE = "Start a cluster with `ray start --head` and name its HOST:PORT, or say --ray auto."


def _knock(address: str) -> None:
    """Raises `BadRequest` unless something answers at an address such as ``10.0.0.5:6379`` or ``ray://head:10001``."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise BadRequest(f"no Ray cluster answers at {address} ({error}). {_CURE}", "ray") from None
