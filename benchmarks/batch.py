"""Batch rendering measured: its speed against a loop of single calls, its memory over many rows, and how fast a long
prompt file is checked.

    python benchmarks/batch.py                      # mini, or the tiny test models where mini is not here
    python benchmarks/batch.py --base sdxl --pipeline instantid --photo a.jpg --photo b.jpg --size 1024x1024 --steps 30

Writes benchmarks/results/batch-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import idgen  # noqa: E402
from idgen.batch.plan import Plan  # noqa: E402
from idgen.batch.render import Renderer  # noqa: E402
from idgen.batch.rows import read_rows  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=None)
    parser.add_argument("--pipeline", default=None)
    parser.add_argument("--photo", action="append", default=None)
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--many", type=int, default=500)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline, settings, photos = models(options, folder)
        report = {
            "machine": about(options.device),
            "models": f"{options.base or settings.get('base')}, {pipeline}".replace(str(ROOT) + os.sep, ""),
            "image": {"size": options.size, "steps": options.steps},
            "speed": speed(options, folder, pipeline, settings, photos),
            "validation": validation(options, folder, pipeline, settings, photos),
            "memory": memory(options, folder, pipeline, settings, photos),
        }
    out = options.out or ROOT / "benchmarks/results" / f"batch-{options.device.split(':')[0]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def models(options: Any, folder: Path) -> tuple[str, dict[str, Any], list[str]]:
    """Pipeline, settings and photos: as asked, else those of the tests."""
    if options.base:
        if not (options.pipeline and options.photo):
            raise SystemExit("--base needs --pipeline and --photo too")
        return options.pipeline, {"base": options.base, "device": options.device}, [str(Path(p)) for p in options.photo]
    from tests import models as tests

    photos = [str(path) for person, path in tests.photos(folder / "photos").items() if person != "nobody"]
    return tests.PIPELINE, tests.settings(folder) | {"device": options.device}, photos


def rows(options: Any, pipeline: str, photos: list[str], count: int) -> list[dict[str, Any]]:
    """So many rows: every person with 16 prompts in turn, a seed each."""
    width, height = (int(side) for side in options.size.split("x"))
    common: dict[str, Any] = {"pipeline": pipeline, "width": width, "height": height}
    if options.steps:
        common["steps"] = options.steps
    return [
        {"who": photos[k % len(photos)], "prompt": f"portrait number {k % 16}", "seed": k, **common}
        for k in range(count)
    ]


def speed(options: Any, folder: Path, pipeline: str, settings: dict[str, Any], photos: list[str]) -> dict[str, Any]:
    """Images per second, models warm in both: a loop of `generate` and `save`, and the batch with all it writes."""
    wanted = rows(options, pipeline, photos, options.rows)
    pipe = idgen.load(pipeline, **settings)
    # Two warm-ups: the first photo, the first kernels.
    for row in wanted[:2]:
        pipe.generate(**{k: v for k, v in row.items() if k != "pipeline"})
    loops, batches = [], []
    loops_cpu, batches_cpu = [], []
    (folder / "loop").mkdir()
    renderers = Renderer._loaded
    for repeat in range(options.repeats):  # by turns, so that a busy machine is busy for both
        pipe.backbone.text_cache.clear()
        begun, cpu = time.perf_counter(), time.process_time()
        for k, row in enumerate(wanted):
            fields = {name: value for name, value in row.items() if name != "pipeline"}
            pipe.generate(**fields)[0].save(folder / "loop" / f"{k}.png")
        loops.append(time.perf_counter() - begun)
        loops_cpu.append(time.process_time() - cpu)
        pipe.backbone.text_cache.clear()
        Renderer._loaded = lambda self, name: setattr(self, "_pipeline", pipe) or pipe  # type: ignore[method-assign]
        begun, cpu = time.perf_counter(), time.process_time()
        idgen.render_batch(wanted, folder / f"batch{repeat}", batch_size=options.batch_size, **settings)
        batches.append(time.perf_counter() - begun)
        batches_cpu.append(time.process_time() - cpu)
        Renderer._loaded = renderers  # type: ignore[method-assign]
    loop, batch = statistics.median(loops), statistics.median(batches)
    return {
        "rows": options.rows,
        "batch_size": options.batch_size,
        "loop_images_per_second": round(options.rows / loop, 3),
        "batch_images_per_second": round(options.rows / batch, 3),
        "speed_up": round(loop / batch, 3),
        "speed_up_each": [round(a / b, 3) for a, b in zip(loops, batches)],
        # What a machine that others use too can say: processor time, not waiting for one's turn.
        "loop_cpu_seconds_an_image": round(statistics.median(loops_cpu) / options.rows, 4),
        "batch_cpu_seconds_an_image": round(statistics.median(batches_cpu) / options.rows, 4),
        "cpu_speed_up": round(statistics.median(loops_cpu) / statistics.median(batches_cpu), 3),
        "largest_pixel_difference": difference(folder / "loop", folder / "batch0", options.rows),
    }


def difference(loop: Path, batch: Path, count: int) -> dict[str, float]:
    """Between the same row alone and in a batch, in levels of 255."""
    import numpy as np
    from PIL import Image

    names = {record["row"]: record["file"] for record in map(json.loads, (batch / "results.jsonl").open())}
    worst, changed = 0, []
    for k in range(count):
        one, other = (np.asarray(Image.open(p), np.int16) for p in (loop / f"{k}.png", batch / names[k + 1]))
        worst = max(worst, int(np.abs(one - other).max()))
        changed.append(float((one != other).mean()))
    return {"levels": worst, "share_of_values_that_differ": round(float(np.mean(changed)), 6)}


def validation(
    options: Any, folder: Path, pipeline: str, settings: dict[str, Any], photos: list[str]
) -> dict[str, Any]:
    """Seconds and peak memory of planning a long file, against one of a tenth of its length."""
    found: dict[str, Any] = {}
    for lines in (options.lines // 10, options.lines):
        file = folder / f"{lines}.jsonl"
        with file.open("w") as out:
            for row in rows(options, pipeline, photos, lines):
                out.write(json.dumps(row) + "\n")
        begun = time.perf_counter()
        plan(file, settings)
        seconds = time.perf_counter() - begun
        tracemalloc.start()
        plan(file, settings)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        begun = time.perf_counter()
        idgen.render_batch(file, folder, dry_run=True, **settings)
        dry = time.perf_counter() - begun
        found[str(lines)] = {
            "plan_seconds": round(seconds, 3),
            "dry_run_seconds": round(dry, 3),
            "peak_python_mib": round(peak / 2**20, 2),
        }
    return found


def plan(file: Path, settings: dict[str, Any]) -> None:
    made = Plan("{row}.png", str(file.parent), settings)
    for row in read_rows(file, {}, {}):
        made.add(row)
    made.db.close()


def memory(options: Any, folder: Path, pipeline: str, settings: dict[str, Any], photos: list[str]) -> dict[str, Any]:
    """Resident memory while many rows are rendered, sampled as images are finished."""
    import psutil

    out, samples, ended = folder / "many", list[tuple[int, float]](), threading.Event()
    process = psutil.Process()

    def watch() -> None:
        while not ended.wait(0.2):
            log = out / "results.jsonl"
            done = log.read_bytes().count(b"\n") if log.exists() else 0
            samples.append((done, process.memory_info().rss / 2**20))

    watcher = threading.Thread(target=watch)
    watcher.start()
    wanted = rows(options, pipeline, photos, options.many)
    idgen.render_batch(wanted, out, batch_size=options.batch_size, **settings)
    ended.set()
    watcher.join()
    at = {share: max(mib for done, mib in samples if done <= share * options.many) for share in (0.2, 0.5, 1.0)}
    return {
        "rows": options.many,
        "peak_rss_mib_at": {f"{share:.0%}": round(mib, 1) for share, mib in at.items()},
        "growth_from_20_percent_on_mib": round(at[1.0] - at[0.2], 1),
    }


def about(device: str) -> dict[str, Any]:
    import torch

    card = torch.cuda.get_device_name(0) if device.startswith("cuda") else None
    processor = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": processor,
        "cores": os.cpu_count(),
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "gpu": card,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
