"""The two calls under everything: :func:`load` and :func:`generate`."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from idgen.backbone import Backbone, choose_device, choose_dtype
from idgen.bases import BASES, base_name
from idgen.errors import BadRequest, LicenceRefused, WeightsMissing
from idgen.faces import FaceExtractor
from idgen.few_step import few_step_entry
from idgen.locate import MINI, is_commercial, locate
from idgen.method import Files, Method
from idgen.pipeline import Pipeline
from idgen.portrait import Portrait
from idgen.prepare import networks_of, prepare
from idgen.registry import method, methods, methods_of, needed_entries, pipelines
from idgen.residents import SPARE
from idgen.speed import Levers, choose_levers
from idgen.weights.licences import commercial_only
from idgen.weights.manifest import load_manifest

log = logging.getLogger("idgen")

_lock = threading.RLock()
_backbones: WeakValueDictionary[tuple[Any, ...], Backbone] = WeakValueDictionary()
"""those that a pipeline still uses: they are gigabytes"""
_extractors: dict[tuple[str, str], FaceExtractor] = {}
_loaded: OrderedDict[tuple[Any, ...], Pipeline] = OrderedDict()
"""the least recently used first"""

PREFERRED = ("instantid", "ip-adapter-faceid-plusv2", "ip-adapter-faceid", "ip-adapter-plus-face", "arc2face")
"""What ``pipeline="auto"`` tries, best likeness first."""


def load(
    pipeline: str = "auto",
    *,
    base: str | Path | Backbone | None = None,
    adapter: str | Path | None = None,
    controlnet: str | Path | None = None,
    image_encoder: str | Path | None = None,
    faces: str | Path | FaceExtractor | None = None,
    recogniser: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    offload: str | None = None,
    vae_slicing: bool = False,
    vae_tiling: bool = False,
    config: str | Path | None = None,
    speed: str | Levers = "exact",
    **options: Any,
) -> Pipeline:
    """Load a pipeline. Its models stay in memory as long as it does; pipelines on the same base share one backbone.

    Args:
        pipeline: a registered name, two joined by ``+``, or ``"auto"``: the best whose weights are here, else mini.
        base: ``sdxl``, ``sd15``, ``mini``, a diffusers folder, a hub id, a ``.safetensors`` file, or a backbone already
            loaded; ``None`` takes the first of the method's bases whose weights are here.
        adapter, controlnet, image_encoder: weights by explicit path, in place of the manifest's.
        faces: a face-pack folder, or an extractor; it then reads the face for all methods of a combination. ``None``
            takes for each method the recogniser that it was trained on.
        recogniser: a recogniser's ONNX file, in place of the one in ``faces`` or in the best pack that is here.
        device, dtype: see :func:`idgen.backbone.choose_device` and :func:`~idgen.backbone.choose_dtype`.
        attention: one of :data:`idgen.adapters.attention.BACKENDS`.
        offload, vae_slicing, vae_tiling, config: see :meth:`idgen.backbone.Backbone.load`.
        speed: ``"exact"``, ``"fast"``, ``"turbo"`` or :class:`idgen.speed.Levers`. Levers that change models act
            on a backbone that is passed in for all who use it.
        options: the method's own settings, such as ``normalise=False``.
    Raises:
        BadRequest, WeightsMissing, BadWeights, LicenceRefused.
    """
    levers = choose_levers(speed)
    explicit = {"adapter": adapter, "controlnet": controlnet, "image_encoder": image_encoder}
    paths = {role: Path(path) for role, path in explicit.items() if path is not None}
    if pipeline == "auto":
        pipeline, base = choose(base)
    classes = methods_of(pipeline)
    base = _default_base(classes, base) if base is None else _alias(classes[0], base)
    if isinstance(base, str) and base in BASES:
        for cls in classes:
            if base not in cls.bases():
                raise BadRequest(
                    f"{cls.name} has no weights for {base!r}; it runs on {', '.join(cls.bases())}.", "base"
                )
        _refuse_licence(classes, base)
        if levers.few_step is not None:
            few_step_entry(levers.few_step, base)
    elif not paths:
        known = base_name(base) if isinstance(base, Backbone) else None
        _refuse_licence([cls for cls in classes if cls.weights], known)
    with _lock:
        memory = {"offload": offload, "vae_slicing": vae_slicing, "vae_tiling": vae_tiling}
        backbone = (
            base
            if isinstance(base, Backbone)
            else _backbone(base, device=device, dtype=dtype, config=config, levers=levers, **memory)
        )
        loaded = [
            cls(backbone, Files(_paths(cls, base_name(backbone), paths), _own_options(cls, options, classes)))
            for cls in classes
        ]
        extractor: FaceExtractor | None
        further: dict[str, FaceExtractor | None] = {}
        if isinstance(faces, FaceExtractor):
            extractor = faces
        elif faces is None and recogniser is None:
            extractor, further = _extractors_if_here(classes, backbone)
        else:
            pack = Path(faces) if faces is not None else default_extractor().pack
            extractor = FaceExtractor(pack, Path(recogniser) if recogniser else None, device=device)
        prepare(backbone, networks_of(loaded), levers)
    return Pipeline(backbone, loaded, extractor, further=further, attention=attention, levers=levers)


def generate(
    who: Any = None,
    prompt: str | None = None,
    *,
    pipeline: str = "auto",
    base: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    callback: Any = None,
    **fields: Any,
) -> list[Portrait]:
    """Make portraits of one person in one call. Models stay resident between calls.

    Args:
        who: a photo, several photos of one person, or an :class:`idgen.Identity`.
        prompt: what to show.
        pipeline, base, device, dtype: as for :func:`load`.
        callback, fields: as for :meth:`idgen.pipeline.Pipeline.generate` (``n``, ``seed``, ``steps``, ``width`` ...).
    Raises:
        IdgenError: one of its kinds; see :func:`load` and :meth:`idgen.pipeline.Pipeline.generate`.
    """
    return resident(pipeline, base=base, device=device, dtype=dtype).generate(who, prompt, callback=callback, **fields)


def resident(pipeline: str = "auto", **settings: Any) -> Pipeline:
    """The pipeline loaded with these settings, loading it where it is not there. The most recently used stay in memory,
    as many as :data:`idgen.residents.SPARE`."""
    key = (pipeline, *sorted((name, str(value)) for name, value in settings.items() if value is not None))
    with _lock:
        if key not in _loaded:
            while len(_loaded) >= SPARE:
                _loaded.popitem(last=False)
            _loaded[key] = load(pipeline, **settings)
        _loaded.move_to_end(key)
        return _loaded[key]


def unload() -> None:
    """Drop all resident models."""
    with _lock:
        _loaded.clear()
        _backbones.clear()
        _extractors.clear()


def default_extractor() -> FaceExtractor:
    """The face extractor of the best face pack on this machine that may be used; mini's when there is no other."""
    for entry in ("antelopev2", "buffalo_l", "mini-faces"):
        if commercial_only() and is_commercial([entry]) is not True:
            continue
        try:
            return _extractor(locate(entry), None, "auto")
        except WeightsMissing:
            continue
    raise WeightsMissing("no face pack is here. Get one with: idgen weights pull buffalo_l --accept-licence")


def extractor_for(cls: type[Method], backbone: Backbone) -> FaceExtractor:
    """The extractor whose recogniser a method was trained on.

    Raises:
        WeightsMissing: it is not here; names the command that gets it.
    """
    entry = _recogniser_entry(cls, backbone)
    if entry is None:
        return default_extractor()
    device = "cpu" if backbone.device.type != "cuda" else "cuda"
    if cls.detector is not None and not entry.startswith("mini"):
        return _extractor(locate(cls.detector), locate(entry), device)
    return _extractor(locate(entry), None, device)


def _extractor(pack: Path, recogniser: Path | None, device: str) -> FaceExtractor:
    key = (str(pack), str(recogniser))
    if key not in _extractors:
        _extractors[key] = FaceExtractor(pack, recogniser, device=device)
    return _extractors[key]


def _extractors_if_here(
    classes: list[type[Method]], backbone: Backbone
) -> tuple[FaceExtractor | None, dict[str, FaceExtractor | None]]:
    """The first face reader's extractor, and those of methods that were trained on another recogniser, by their names:
    InstantID reads antelopev2's embeddings, FaceID buffalo_l's, and neither understands the other's."""
    readers = [cls for cls in classes if cls.recogniser] or classes[:1]
    first = _recogniser_entry(readers[0], backbone)
    others = [cls for cls in readers[1:] if _recogniser_entry(cls, backbone) != first]
    return _extractor_if_here(readers[0], backbone), {cls.name: _extractor_if_here(cls, backbone) for cls in others}


def _extractor_if_here(cls: type[Method], backbone: Backbone) -> FaceExtractor | None:
    try:
        return extractor_for(cls, backbone)
    except WeightsMissing:
        return None


def _recogniser_entry(cls: type[Method], backbone: Backbone) -> str | None:
    name = base_name(backbone)
    return cls.recogniser.get(name) or next(iter(cls.recogniser.values()), None)


def choose(base: Any) -> tuple[str, Any]:
    """Pipeline and base for ``"auto"``: real weights before mini, best likeness first."""
    if isinstance(base, (Path, Backbone)) or (base is not None and base not in (*BASES, "mini")):
        raise BadRequest("with a base of your own, name the pipeline too.", "pipeline")
    infos = {info.name: info for info in pipelines()}
    for real in (True, False):
        for name in PREFERRED:
            for candidate in infos[name].available:
                if candidate.startswith("mini") == real or _alias_matches(base, candidate) is False:
                    continue
                if _allowed(method(name), candidate):
                    return name, candidate
    raise WeightsMissing(
        "no pipeline has all its weights here. List them with: idgen weights list; "
        "get one with: idgen weights pull instantid --accept-licence"
    )


def _alias_matches(base: Any, candidate: str) -> bool:
    return base is None or base == candidate or (base == "mini" and candidate.startswith("mini"))


def _alias(cls: type[Method], base: Any) -> Any:
    """``"mini"`` stands for whichever mini base the method runs on."""
    if base == "mini":
        for candidate in cls.bases():
            if candidate.startswith("mini"):
                return candidate
        raise BadRequest(f"{cls.name} has no mini weights; it runs on {', '.join(cls.bases())}.", "base")
    return base


def _default_base(classes: list[type[Method]], base: Any) -> str:
    """The first base for which all weights of all methods are here; the first of all when none has them."""
    common = [name for name in classes[0].bases() if all(name in cls.bases() for cls in classes)]
    if not common:
        raise BadRequest(f"{' and '.join(cls.name for cls in classes)} share no base model.", "pipeline")
    for name in common:
        try:
            for cls in classes:
                for entry in needed_entries(cls, name):
                    locate(entry)
        except WeightsMissing:
            continue
        return name
    return common[0]


def _allowed(cls: type[Method], base: str) -> bool:
    try:
        _refuse_licence([cls], base)
    except LicenceRefused:
        return False
    return True


def _refuse_licence(classes: list[type[Method]], base: str | None) -> None:
    """With ``IDGEN_COMMERCIAL_ONLY``, refuse a pipeline that would use a weight whose licence forbids it."""
    if not commercial_only():
        return
    for cls in classes:
        name = base if base in cls.bases() else cls.bases()[0]
        if is_commercial(needed_entries(cls, name)) is not True:
            remaining = [
                f"{other} on {b}"
                for other, c in sorted(methods().items())
                for b in c.bases()
                if is_commercial(needed_entries(c, b)) is True
            ]
            raise LicenceRefused(
                f"{cls.name} on {name} needs weights whose licence does not allow commercial use, and "
                f"IDGEN_COMMERCIAL_ONLY is set. These remain: {', '.join(remaining) or 'none'}."
            )


def _backbone(base: Any, **settings: Any) -> Backbone:
    source = locate(base) if base in BASES else base
    device, _ = choose_device(settings.pop("device"))
    dtype, _ = choose_dtype(device, settings.pop("dtype"))
    levers: Levers = settings.pop("levers")
    key = (str(source), device, dtype, levers.load_key, *sorted((k, str(v)) for k, v in settings.items()))
    backbone = _backbones.get(key)
    if backbone is None:
        variant = load_manifest()[base].variant if base in BASES and base not in MINI else None
        backbone = _backbones[key] = Backbone.load(source, device=device, dtype=dtype, variant=variant, **settings)
        backbone.source = str(base)
        if base_name(backbone) in MINI:
            log.warning(
                "using mini, the small bundled model set: it knows synthetic heads only. "
                "For real people: idgen weights pull sdxl instantid --accept-licence"
            )
    return backbone


def _paths(cls: type[Method], base: str, explicit: dict[str, Path]) -> dict[str, Path]:
    paths = dict(explicit)
    for role, weight in cls.weights.get(base, {}).items():
        if role in paths:
            continue
        try:
            root = locate(weight.entry)
        except WeightsMissing:
            if explicit and "adapter" in explicit:
                continue  # the method itself says what it cannot do without
            raise
        inside = [root / name for name in weight.inside]
        paths[role] = next((path for path in inside if path.exists()), inside[0] if inside else root)
    if base not in cls.weights and not paths:
        raise BadRequest(
            f"{cls.name} has no weights for {base!r}; it runs on {', '.join(cls.bases())}. Or give adapter=FILE.",
            "base",
        )
    return paths


def _own_options(cls: type[Method], options: dict[str, Any], classes: list[type[Method]]) -> dict[str, Any]:
    """The options meant for ``cls``; one that no method knows goes to the first, which refuses it by name."""
    known = {name for other in classes for name in other.options}
    stray = {name for name in options if name not in known} if cls is classes[0] else set()
    return {name: value for name, value in options.items() if name in cls.options or name in stray}
