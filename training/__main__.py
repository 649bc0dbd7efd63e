"""``python -m idgen.training``: make mini, whole or stage by stage.

python -m idgen.training all --device cuda --minutes 25
python -m idgen.training all --device cpu --minutes 240 --workers 3
python -m idgen.training generator --minutes 60        # one stage; started again it goes on where it stopped
python -m idgen.training sheet                          # look at the renderer
python -m idgen.training export --out weights/mini
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from idgen.errors import IdgenError


def main() -> None:
    """Parse the command line and run."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # it notes when it is imported which of its image processors it falls back to

    from .stages import STAGES

    parser = argparse.ArgumentParser(prog="python -m idgen.training", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["all", "sheet", "examples", "export", *STAGES], help="what to do")
    parser.add_argument("--root", type=Path, default=Path("runs/mini"), help="folder for data, checkpoints and sheets")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=25.0, help="budget of the stage, or of all of them together")
    parser.add_argument("--workers", type=int, default=3, help="CPU processes for the long stages")
    parser.add_argument("--shards", type=int, default=0, help="training shards of 100 people (default: by device)")
    parser.add_argument("--out", type=Path, default=Path("weights/mini"), help="where export writes the model set")
    o = parser.parse_args()
    if o.minutes <= 0 or o.workers < 1 or o.shards < 0:
        parser.error("--minutes must be above 0, --workers at least 1, --shards 0 or more")
    if o.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {o.device}: torch sees no CUDA GPU here; use cpu")
    try:
        _work(o)
    except IdgenError as error:
        parser.error(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        parser.error(f"{error.filename}: {error.strerror}")


def _work(o: argparse.Namespace) -> None:
    from . import stages
    from .preparing_stages import sheet
    from .run import Run
    from .workers import join_workers

    group = join_workers()
    if o.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    run = Run(o.root, o.device, o.minutes, o.workers, o.shards, group)

    def command(name: str, minutes: float) -> list[str]:
        return [
            name,
            "--root",
            str(o.root),
            "--device",
            o.device,
            "--minutes",
            f"{minutes:g}",
            "--shards",
            str(o.shards),
        ]

    if o.stage == "sheet":
        sheet(run)
    elif o.stage == "examples":
        from .examples import write

        print(*write(o.out), sep="\n")
    elif o.stage == "export":
        from .package import export

        stages.check_done("export", ("generator", "text", "autoencoder"), run)
        export(run, o.out)
    elif o.stage == "all":
        stages.all_stages(run, o.minutes, command)
        from .package import export

        export(run, o.out)
    else:
        stages.run_stage(o.stage, run, command(o.stage, o.minutes))


if __name__ == "__main__":
    main()
