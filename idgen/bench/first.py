"""What a new process does until its first picture: import, load, first picture, and the next one for comparison.

Run as a program it is that process (``python -m idgen.bench.first instantid``) and prints JSON; `first_picture_of`
starts it. ``random`` stands for InstantID's networks with random weights, for machines without any others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time


def first_picture_of(
    what: str,
    *,
    size: str = "nano",
    device: str = "cpu",
    dtype: str = "float32",
    steps: int = 20,
    threads: int | None = None,
) -> dict[str, float]:
    """Stage -> wall-clock seconds, of a pipeline on mini or of ``random``.

    Args:
        size, dtype: of ``random``. threads: of the new process; ``None`` leaves them to torch.
    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "idgen.bench.first", what, "--size", size, "--device", device, "--dtype", dtype]
    command += ["--steps", str(steps), "--begun", repr(time.time())]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"a new process failed: {done.stderr[-300:]}")
    stages: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return stages


def main() -> None:
    """Measure this process."""
    parser = argparse.ArgumentParser(description="Time a new process until its first pictures.")
    parser.add_argument("what")
    parser.add_argument("--size", default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--begun", type=float, default=time.time())
    options = parser.parse_args()
    stages, last = {}, options.begun

    def lap(name: str) -> None:
        nonlocal last
        now = time.time()
        stages[name], last = round(now - last, 4), now

    import idgen.api  # noqa: F401  (what `import idgen` leaves for later is part of the start)

    lap("start and import")
    make = _random(options) if options.what == "random" else _mini(options)
    lap("load")
    make()
    lap("first picture")
    stages["all until the first picture"] = round(last - options.begun, 4)
    make()
    lap("second picture")
    print(json.dumps(stages))


def _random(options: argparse.Namespace):  # type: ignore[no-untyped-def]
    from idgen.bench.models import SIZES
    from idgen.bench.workloads import Workload
    from idgen.speed import Levers

    workload = Workload.make("instantid", SIZES[options.size], options.device, options.dtype)
    workload.prepare(Levers())
    return lambda: workload.ours(options.steps).cpu()


def _mini(options: argparse.Namespace):  # type: ignore[no-untyped-def]
    import idgen
    from idgen.bench.photos import photos

    pipe = idgen.load(options.what, base="mini", device=options.device, dtype=options.dtype)
    photo = photos(1)[0]
    return lambda: pipe.generate(photo, seed=0, steps=options.steps)


if __name__ == "__main__":
    main()
