"""One short file per method family: which adapters, which weights, which defaults, which quirks.

The package is callable: ``idgen.pipelines()`` lists what is registered (see :func:`idgen.registry.pipelines`). Package
and public function share their name, and importing a submodule would otherwise hide the function.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from idgen.registry import PipelineInfo


class _Callable(ModuleType):
    def __call__(self) -> list[PipelineInfo]:
        from idgen.registry import pipelines

        return pipelines()


sys.modules[__name__].__class__ = _Callable
