"""The registry of pipelines: ours, and third parties' through the entry-point group ``idgen.pipelines``."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from idgen.errors import BadRequest, WeightsMissing

if TYPE_CHECKING:
    from idgen.method import Method

    T = TypeVar("T", bound=type[Method])

_METHODS: dict[str, type[Method]] = {}
_OWN = tuple(f"idgen.pipelines.{name}" for name in ("plain", "ip_adapter", "faceid", "instantid", "arc2face"))
_loaded = False


@dataclass(frozen=True)
class PipelineInfo:
    """What is known of a pipeline without loading it."""

    name: str
    description: str
    bases: tuple[str, ...]
    available: tuple[str, ...]
    """the bases for which every weight is on this machine and allowed"""
    missing: dict[str, tuple[str, ...]]
    """base -> manifest entries that are missing"""
    commercial: dict[str, bool | str]
    """base -> whether all licences allow commercial use"""

    def as_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return asdict(self)


def register(name: str) -> Callable[[T], T]:
    """Class decorator: make a :class:`idgen.method.Method` known under ``name``.

    Raises:
        BadRequest: the name is taken, or is not made of lower-case letters, digits and hyphens.
    """
    if not name or not all(c.isascii() and (c.islower() or c.isdigit() or c == "-") for c in name):
        raise BadRequest(f"pipeline name {name!r}: use lower-case letters, digits and hyphens.", "pipeline")

    def add(cls: T) -> T:
        known = _METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise BadRequest(f"a pipeline named {name!r} is already registered by {known.__module__}.", "pipeline")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def methods() -> dict[str, type[Method]]:
    """All registered methods by name. A third party's plugin that fails to import is warned about, never fatal."""
    global _loaded
    if not _loaded:
        _loaded = True
        for module in _OWN:
            importlib.import_module(module)
        for entry in importlib.metadata.entry_points(group="idgen.pipelines"):
            try:
                loaded = entry.load()
                if isinstance(loaded, type) and entry.name not in _METHODS and not hasattr(loaded, "name"):
                    register(entry.name)(loaded)
            except Exception as error:
                warnings.warn(f"the plugin {entry.name!r} ({entry.value}) failed to load: {error}", stacklevel=2)
    return _METHODS


def method(name: str) -> type[Method]:
    """The method registered under ``name``.

    Raises:
        BadRequest: there is none; the nearest names are given.
    """
    table = methods()
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise BadRequest(f"there is no pipeline {name!r}.{hint} There are: {', '.join(sorted(table))}.", "pipeline")
    return table[name]


def methods_of(pipeline: str) -> list[type[Method]]:
    """The methods that the name of a pipeline joins by ``+``.

    Raises:
        BadRequest: there is none of that name, or one is named twice.
    """
    names = pipeline.split("+")
    found = [method(name) for name in names]
    if len(set(names)) < len(names):
        raise BadRequest(f"{pipeline!r} names a pipeline twice: it joins different ones.", "pipeline")
    return found


def needed_entries(cls: type[Method], base: str) -> tuple[str, ...]:
    """All manifest entries that a method needs on a base: its weights, the base itself, the face pack."""
    entries = [weight.entry for weight in cls.weights[base].values()]
    faces = [name for name in (cls.recogniser.get(base), cls.detector if not base.startswith("mini") else None) if name]
    return tuple(dict.fromkeys([base, *entries, *faces]))


def pipelines() -> list[PipelineInfo]:
    """What is registered, and whether its weights are here."""
    from idgen.locate import is_commercial, locate

    infos = []
    for name, cls in sorted(methods().items()):
        available, missing, commercial = [], {}, {}
        for base in cls.bases():
            lacking = []
            for entry in needed_entries(cls, base):
                try:
                    locate(entry)
                except WeightsMissing:
                    lacking.append(entry)
            commercial[base] = is_commercial(needed_entries(cls, base))
            if lacking:
                missing[base] = tuple(lacking)
            else:
                available.append(base)
        infos.append(PipelineInfo(name, cls.description, cls.bases(), tuple(available), missing, commercial))
    return infos
