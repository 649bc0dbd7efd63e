"""The HTTP service under load: 50 clients, 500 requests, with dynamic batching and without.

    python benchmarks/service_load.py                   # mini
    python benchmarks/service_load.py --base sdxl --pipeline text-to-image --size 1024 --steps 30 --device cuda

Both servers run at once in processes of their own and are loaded in turns, so that a busy machine slows both alike.
Every picture is compared with the one its seed gives alone. Then twice as many clients overload the server with
batching, and some leave early on purpose.
Writes benchmarks/results/service-DEVICE.json.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import os
import platform
import random
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="mini")
    parser.add_argument("--pipeline", default="ip-adapter-faceid-plusv2")
    parser.add_argument("--photos", type=Path, nargs="*", help="people to enrol; mini: those of examples/")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=500, help="to the server with batching")
    parser.add_argument("--compared", type=int, default=500, help="requests to the server without")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--leavers", type=int, default=50, help="requests whose client leaves early")
    parser.add_argument("--overload", type=int, default=100, help="requests while they do")
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.photos is None:
        options.photos = sorted(ROOT.glob("examples/*/1.png")) if options.base == "mini" else []
    report = asyncio.run(measure(options))
    out = options.out or ROOT / "benchmarks/results" / f"service-{options.device.split(':')[0]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def serve(options: argparse.Namespace, batching: bool, port: int, folder: str) -> None:
    """A server, in a process of its own."""
    import uvicorn

    from idgen.engine import Engine
    from idgen.service.app import create_app
    from idgen.service.settings import ServiceSettings

    load = {"base": options.base, "device": options.device, "dtype": options.dtype}
    engine = Engine(load, queue_size=options.queue, max_batch=options.max_batch, batching=batching)
    settings = ServiceSettings(pipelines=(options.pipeline,), demo=False, identities_folder=Path(folder))
    uvicorn.run(create_app(settings, engine), port=port, log_level="error")


@dataclass
class Side:
    """One of the two servers and what was seen of it."""

    name: str
    url: str
    process: Any
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    refused: int = 0
    left: int = 0
    crossed: int = 0
    worst: int = 0
    memory: list[int] = field(default_factory=list)
    references: dict[int, np.ndarray] = field(default_factory=dict)
    people: list[str] = field(default_factory=list)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, batching in (("batching", True), ("one by one", False)):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    port = probe.getsockname()[1]
                process = context.Process(target=serve, args=(options, batching, port, folder), daemon=True)
                process.start()
                sides.append(Side(name, f"http://127.0.0.1:{port}", process))
            for side in sides:
                await ready(side)
                await enrol(side, options)
                await references(side, options)
            wanted = {sides[0].name: options.requests, sides[1].name: options.compared}
            for number in range(options.rounds):
                for side in sides if number % 2 == 0 else reversed(sides):
                    await load(side, options, wanted[side.name] // options.rounds)
            reports = {side.name: await summary(side, wanted[side.name], options) for side in sides}
            overloaded = await overload(sides[0], options)
        finally:
            for side in sides:
                side.process.terminate()
    speeds = [reports[side.name]["images_per_second"] for side in sides]
    return {
        "machine": about(options),
        "order": {
            **{name: getattr(options, name) for name in ("pipeline", "size", "steps")},
            "base": options.base,
            "people": len(options.photos),
        },
        "load": {name: getattr(options, name) for name in ("clients", "queue", "max_batch")},
        "speedup_by_batching": round(speeds[0] / speeds[1], 2),
        **reports,
        "overload": overloaded,
    }


def about(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "CPU"
    return {
        "device": device,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "cores": os.cpu_count(),
        "load_average": [round(value, 1) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
    }


async def ready(side: Side) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        for _ in range(600):
            try:
                if (await client.get(f"{side.url}/readyz")).status_code == 200:
                    return
            except httpx.ConnectError:
                pass
            await asyncio.sleep(0.2)
    raise SystemExit(f"the server {side.name!r} did not start")


async def enrol(side: Side, options: argparse.Namespace) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=600) as client:
        for photo in options.photos:
            answer = await client.post(f"{side.url}/v1/identities", files={"photo": photo.read_bytes()})
            side.people.append(answer.raise_for_status().json()["id"])


def order(side: Side, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    size = {"width": options.size, "height": options.size}
    who = {"identity": side.people[seed % len(side.people)]} if side.people else {}
    prompt = f"a photo of a person, {('red', 'green', 'blue')[seed % 3]} background"
    return {"prompt": prompt, "pipeline": options.pipeline, "seed": seed, "steps": options.steps, **size, **who}


def decoded(answer: httpx.Response) -> np.ndarray:
    image = base64.b64decode(answer.json()["portraits"][0]["image"])
    return np.asarray(Image.open(io.BytesIO(image)), np.int16)


async def references(side: Side, options: argparse.Namespace) -> None:
    """What each client's seed gives alone."""
    async with httpx.AsyncClient(trust_env=False, timeout=600) as client:
        for seed in range(options.clients):
            answer = await client.post(f"{side.url}/v1/portraits", json=order(side, options, seed))
            side.references[seed] = decoded(answer.raise_for_status())


async def load(side: Side, options: argparse.Namespace, requests: int) -> None:
    """One round: all clients at once, each asking for its own seed's picture again and again."""
    left = [requests]
    started = time.perf_counter()
    await asyncio.gather(*(visit(side, options, seed, left) for seed in range(options.clients)))
    side.seconds += time.perf_counter() - started
    side.memory.append(resident(side))


async def overload(side: Side, options: argparse.Namespace) -> dict[str, Any]:
    """More clients than there are places, and some that leave: what the server says of it afterwards."""
    before, answered, left = await settled(side), len(side.latencies), [options.overload]
    leaving = [leave(side, options, number) for number in range(options.leavers)]
    staying = [visit(side, options, number % options.clients, left) for number in range(2 * options.clients)]
    await asyncio.gather(*leaving, *staying)
    after = await settled(side)
    return {
        "clients": 2 * options.clients,
        "answered": len(side.latencies) - answered,
        "lost": options.overload - (len(side.latencies) - answered),
        "crossed": side.crossed,
        "answers_429": int(after[REJECTED] - before[REJECTED]),
        "left_early": side.left,
        "of_these_in_the_queue_or_running_and_cancelled": int(after[CANCELLED] - before[CANCELLED]),
        "still_queued_or_running": int(after["idgen_queue_length"] + after["idgen_running"]),
        "memory_mib": resident(side),
    }


async def visit(side: Side, options: argparse.Namespace, seed: int, left: list[int]) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=600) as client:
        while left[0] > 0:
            left[0] -= 1
            started = time.perf_counter()
            while (answer := await client.post(f"{side.url}/v1/portraits", json=order(side, options, seed))).is_error:
                if answer.status_code != 429:
                    raise SystemExit(f"{answer.status_code}: {answer.text}")
                side.refused += 1
                await asyncio.sleep(random.uniform(0.05, min(1.0, float(answer.headers["retry-after"]))))
            side.latencies.append(time.perf_counter() - started)
            await asyncio.to_thread(check, side, seed, answer)


def check(side: Side, seed: int, answer: httpx.Response) -> None:
    image = decoded(answer)
    off = int(np.abs(image - side.references[seed]).max())
    side.worst = max(side.worst, off)
    nearest = min(side.references, key=lambda other: float(np.abs(image - side.references[other]).mean()))
    side.crossed += nearest != seed or answer.json()["portraits"][0]["seed"] != seed


async def leave(side: Side, options: argparse.Namespace, number: int) -> None:
    """Order something long, and go."""
    await asyncio.sleep(random.uniform(0, 2))
    long = {**order(side, options, number), "steps": 150}
    async with httpx.AsyncClient(trust_env=False, timeout=httpx.Timeout(30, read=random.uniform(0.1, 1))) as client:
        try:
            while (await client.post(f"{side.url}/v1/portraits", json=long)).status_code == 429:
                await asyncio.sleep(random.uniform(0.02, 0.1))
        except httpx.ReadTimeout:
            side.left += 1


def resident(side: Side) -> int:
    import psutil

    return psutil.Process(side.process.pid).memory_info().rss // 2**20


async def metrics(side: Side) -> dict[str, float]:
    async with httpx.AsyncClient(trust_env=False) as client:
        lines = (await client.get(f"{side.url}/metrics")).text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


REJECTED, CANCELLED = (f'idgen_jobs_total{{state="{state}"}}' for state in ("rejected", "cancelled"))


async def settled(side: Side) -> dict[str, float]:
    """The server's metrics when nothing runs any more; the last who left may still have to be noticed."""
    for _ in range(100):
        numbers = await metrics(side)
        if numbers["idgen_queue_length"] == numbers["idgen_running"] == 0:
            break
        await asyncio.sleep(0.1)
    return numbers


async def summary(side: Side, wanted: int, options: argparse.Namespace) -> dict[str, Any]:
    numbers = await settled(side)
    ordered = sorted(side.latencies)
    runs = numbers["idgen_batch_images_count"] - options.clients
    return {
        "answered": len(ordered),
        "lost": wanted - len(ordered),
        "crossed": side.crossed,
        "largest_difference_of_a_channel": side.worst,
        "images_per_second": round(len(ordered) / side.seconds, 2),
        "latency_p50_s": round(statistics.median(ordered), 3),
        "latency_p95_s": round(ordered[int(0.95 * (len(ordered) - 1))], 3),
        "answers_429": side.refused,
        "mean_images_in_a_run": round((numbers["idgen_batch_images_sum"] - options.clients) / runs, 2),
        "memory_mib_after_each_round": side.memory,
    }


if __name__ == "__main__":
    main()
