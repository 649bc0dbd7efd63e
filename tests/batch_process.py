"""What a test's child process runs. Imported once by a fork server, so that a child starts in a moment."""

from __future__ import annotations

from typing import Any

import diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl  # noqa: F401
import insightface.model_zoo  # noqa: F401
import rich.progress  # noqa: F401
import torch
import transformers.models.clip.modeling_clip  # noqa: F401

import idgen.api
import idgen.batch
import idgen.cluster  # noqa: F401
from idgen.registry import methods

methods()
torch.set_num_threads(1)


def main(arguments: list[str], log: str, hold: str | None = None) -> None:
    """Run the command line with its output in a file.

    hold: a file; as long as it is there, no image is recorded after the first one.
    """
    import os
    import sys
    import time
    from pathlib import Path

    from idgen.batch.progress import Bar
    from idgen.cli import main as command

    advance = Bar.advance

    def held(bar: Bar, outcome: Any) -> None:
        advance(bar, outcome)
        while hold is not None and Path(hold).exists():
            time.sleep(0.01)

    Bar.advance = held  # type: ignore[method-assign]

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["idgen", *arguments]
    command(arguments)
