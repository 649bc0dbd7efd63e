"""What a test's child process runs. Imported once by a fork server, so that a child starts in a moment."""

from __future__ import annotations

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


def main(arguments: list[str], log: str) -> None:
    """Run the command line with its output in a file."""
    import os
    import sys

    from idgen.cli import main as command

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["idgen", *arguments]
    command(arguments)
