"""Several single-thread processes that train one model together (gloo all-reduce), or one process on a GPU.

On shared CPU cores three single-thread processes made 2.7 times the samples per second of one process with three
threads: the small convolutions do not spread over threads.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """This process's place among the workers."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process logs and saves."""
        return self.rank == 0

    def mean_(self, tensor: Tensor) -> Tensor:
        """Average over the workers, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
            tensor /= self.count
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the workers, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Everybody gets the first worker's values."""
        if self.count > 1:
            for t in tensors:
                dist.broadcast(t, 0)


def join_workers() -> Workers:
    """Join the group named by the environment (see :func:`launch`); a lone process is a group of one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Workers()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=rank, world_size=count)
    return Workers(rank, count)


def launch(arguments: Sequence[str], count: int) -> None:
    """Run ``python -m idgen.training <arguments>`` in ``count`` processes that form one group, and wait for them.

    Raises RuntimeError when one fails; the others are then stopped.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Without these two glibc hands memory back after every step; the page faults cost more than the arithmetic.
    memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    common = {**os.environ, **memory, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    common["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "idgen.training", *arguments]
    running = [subprocess.Popen(command, env={**common, "RANK": str(rank)}) for rank in range(count)]
    try:
        # Not one after the other: those that wait for one that has failed would go on waiting for half an hour.
        while not any(codes := [p.poll() for p in running]) and None in codes:
            time.sleep(0.1)
    finally:
        for p in running:
            p.terminate()
        for p in running:
            p.wait()
    if any(codes):
        raise RuntimeError(f"training workers ended with codes {codes}: {' '.join(arguments)}")
