"""idgen: identity-preserving portraits. One photo and a prompt in, portraits out that stay recognisably that person.

>>> import idgen
>>> portraits = idgen.generate("ada.png", "oil painting of an astronaut", n=4, seed=7)
>>> portraits[0].likeness
>>> portraits[0].save("out.png")

Everything heavy is imported where it is first needed; ``import idgen`` itself takes milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from idgen.errors import (
    BadImage,
    BadRequest,
    BadWeights,
    Cancelled,
    IdgenError,
    LicenceRefused,
    NoFaceFound,
    OutOfMemory,
    WeightsMissing,
)

if TYPE_CHECKING:
    from idgen.api import generate, load
    from idgen.batch import render_batch
    from idgen.faces import Face, FaceExtractor
    from idgen.identity import Identity
    from idgen.method import Method
    from idgen.pipeline import Pipeline
    from idgen.portrait import Portrait
    from idgen.registry import pipelines, register
    from idgen.request import Request

__version__ = "0.1.0"

_LAZY = {
    "generate": "idgen.api",
    "load": "idgen.api",
    "Face": "idgen.faces",
    "FaceExtractor": "idgen.faces",
    "Identity": "idgen.identity",
    "Method": "idgen.method",
    "Pipeline": "idgen.pipeline",
    "Portrait": "idgen.portrait",
    "register": "idgen.registry",
    "render_batch": "idgen.batch",
    "Request": "idgen.request",
}

__all__ = [
    "BadImage",
    "BadRequest",
    "BadWeights",
    "Cancelled",
    "Face",
    "FaceExtractor",
    "Identity",
    "IdgenError",
    "LicenceRefused",
    "Method",
    "NoFaceFound",
    "OutOfMemory",
    "Pipeline",
    "Portrait",
    "Request",
    "WeightsMissing",
    "__version__",
    "generate",
    "load",
    "pipelines",
    "register",
    "render_batch",
]


def __getattr__(name: str) -> Any:
    if name == "pipelines":
        return import_module("idgen.pipelines")  # a package that can be called; see its docstring
    if name not in _LAZY:
        raise AttributeError(f"module 'idgen' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
