"""Batch rendering: a prompt file in, a finished folder out.

Read in this order: `rows` (prompt files) and `matrix` (what a row stands for), `plan` (every image there is to make),
`render` (from plan to portraits), `writer` and `storage` (how they become durable), `results` and `sheet` (what a run
leaves behind), `runner` (all of it together).
"""

from __future__ import annotations

from idgen.batch.plan import Problem, Unit
from idgen.batch.results import Summary
from idgen.batch.runner import render_batch
from idgen.batch.storage import DiskFull

__all__ = ["DiskFull", "Problem", "Summary", "Unit", "render_batch"]
