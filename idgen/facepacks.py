"""Face model packs on disk: where the detector lies, which file is the recogniser, and loading both with insightface.

insightface routes an ONNX file by its shape and keeps the first of each kind by name. With glintr100.onnx beside
Arc2Face's arcface.onnx that silently takes the wrong recogniser, so here the recogniser is always an explicit file.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, Literal

from idgen.errors import BadRequest, BadWeights, WeightsMissing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_THRESHOLD = 0.5  # the score of a detection; insightface's own default
_PULL = "`idgen weights pull antelopev2` gets one (`idgen weights list` shows the others)"

_loading = threading.Lock()
_warned = threading.Event()


def find_pack(pack: Path) -> Path:
    """Return the folder that holds the detector: `pack` itself or one of up to two levels below.

    The zip of antelopev2 unpacks into `antelopev2/antelopev2/`. The files are looked for, not moved: packs lie on
    read-only mounts and in shared caches, and another program may rely on the layout that it made.

    Raises `WeightsMissing` without such a folder, `BadWeights` with none or several in it that hold a detector.
    """
    if not pack.is_dir():
        raise WeightsMissing(f"{pack} is no folder with a face model pack; {_PULL}.")
    levels = [[pack], sorted(pack.glob("*/")), sorted(pack.glob("*/*/"))]
    seen: list[str] = []
    for folders in levels:
        found = []
        for folder in folders:
            files = _onnx_files(folder)
            seen += [file.relative_to(pack).as_posix() for file in files]
            if any(kind_of(file) == "detector" for file in sorted(files, key=lambda file: file.stat().st_size)):
                found.append(folder)
        if len(found) > 1:
            names = ", ".join(str(folder) for folder in found)
            raise BadWeights(f"{pack} holds several face model packs ({names}). Name one of them.")
        if found:
            return found[0]
    holds = f"only {', '.join(seen)}" if seen else "no .onnx file"
    raise BadWeights(f"{pack} holds no face detector, {holds}. A pack is a folder of .onnx files; {_PULL}.")


def enlargement(folder: Path) -> float | None:
    """Return how much a pack's detector wants small photos enlarged at most: `enlarge = N` in its `pack.toml`.

    Packs without that file, as all public ones are, are used as their authors use them: whatever the photo's size, the
    first look is at 640 pixels. Raises `BadWeights` for a file that says anything else.
    """
    file = folder / "pack.toml"
    if not file.is_file():
        return None
    try:
        value = tomllib.loads(file.read_text(encoding="utf-8"))["enlarge"]
    except (OSError, ValueError, KeyError) as error:
        raise BadWeights(f"{file} cannot be read ({error!r}): it holds one line, such as enlarge = 2.") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 100:
        raise BadWeights(f"{file}: enlarge is {value!r}; it is a number, 1 to 100.")
    return float(value)


def find_recogniser(pack: Path, folder: Path) -> Path:
    """Return the pack's only ArcFace file, in `folder` (see `find_pack`) or, for a nested pack, beside it.

    Raises `BadWeights`, naming them, when there are several, and when there is none.
    """
    files = [file for place in dict.fromkeys((folder, folder.parent, pack)) if place == pack or pack in place.parents
             for file in _onnx_files(place)]  # fmt: skip
    recognisers = [file for file in files if kind_of(file) == "recogniser"]
    if len(recognisers) > 1:
        names = ", ".join(file.name for file in recognisers)
        raise BadWeights(
            f"{pack} holds several recognisers ({names}); their embeddings do not interchange. Say which one to use, "
            f'e.g. recogniser="{recognisers[0]}".'
        )
    if not recognisers:
        names = ", ".join(file.name for file in files)
        raise BadWeights(f"{pack} holds no recogniser (only {names}). Name an ArcFace .onnx file; {_PULL}.")
    return recognisers[0]


def kind_of(file: Path) -> Literal["detector", "recogniser", "other"]:
    """Say what insightface would take an ONNX file for, by the rules of its `model_zoo.ModelRouter`.

    Raises `BadWeights` when the file is no ONNX model.
    """
    import onnx

    try:
        graph = onnx.load(str(file), load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}  # files older than ONNX IR 4 list them as inputs
        inputs = [value for value in graph.input if value.name not in weights]
        shape = [dimension.dim_value for dimension in inputs[0].type.tensor_type.shape.dim]
    except Exception as error:  # protobuf throws its own kinds of DecodeError
        raise BadWeights(f"{file} is no intact ONNX model ({error}). Delete it and get the pack again.") from error
    if len(graph.output) >= 5:
        return "detector"
    square = len(shape) == 4 and shape[2] == shape[3] and shape[2] >= 112 and shape[2] % 16 == 0
    return "recogniser" if square and shape[2] != 192 and len(inputs) == 1 and len(graph.output) == 1 else "other"


def load_models(folder: Path, recogniser: Path, providers: list[Any]) -> tuple[Any, Any]:
    """Load insightface's detector from `folder` and its ArcFace model from the file `recogniser`.

    Raises `WeightsMissing` when `recogniser` is not there, `BadWeights` when a file is not what it has to be.
    """
    if not recogniser.is_file():
        raise WeightsMissing(f"{recogniser}: there is no such recogniser file. Check the path, or {_PULL}.")
    if kind_of(recogniser) != "recogniser":
        raise BadWeights(f"{recogniser} is no ArcFace recogniser (a detector or another model). Name another file.")
    with _loading, contextlib.redirect_stdout(io.StringIO()):  # insightface prints what it loads
        from insightface.app import FaceAnalysis
        from insightface.model_zoo import get_model

        try:
            app = FaceAnalysis(name=str(folder), allowed_modules=["detection"], providers=providers)
            app.prepare(ctx_id=0, det_thresh=_THRESHOLD, det_size=(640, 640))
        except Exception as error:
            raise BadWeights(f"{folder}: this pack cannot be loaded ({error}). Get it again.") from error
        try:
            model = get_model(str(recogniser), providers=providers)
        except Exception as error:
            raise BadWeights(f"{recogniser} cannot be loaded ({error}). Get it again.") from error
    if not getattr(app.det_model, "use_kps", False):
        raise BadWeights(f"{folder}: its detector finds boxes but no keypoints. Use a SCRFD model with keypoints.")
    return app.det_model, model


def providers_for(device: str) -> list[Any]:
    """Return onnxruntime's execution providers for `auto`, `cpu`, `mps`, `cuda` or `cuda:N`.

    `auto` takes CUDA where onnxruntime offers it. On a Mac face work stays on the CPU: it is one pass per photo, and
    CoreML needs a model of fixed size for every detector size tried.
    """
    name, _, index = device.partition(":")
    if name not in ("auto", "cpu", "mps", "cuda") or (index and not index.isdecimal()):
        raise BadRequest(f"device {device!r} is unknown; it is auto, cpu, mps, cuda or cuda:N.", field="device")
    if name in ("cpu", "mps"):
        return [_CPU]
    import onnxruntime

    if _CUDA not in onnxruntime.get_available_providers():
        return [_CPU]
    return [(_CUDA, {"device_id": int(index or 0)}), _CPU]


def warn_of_cpu(device: str, active: list[str]) -> None:
    """Warn, once per process, when the GPU was meant to do the face work and the CPU does it."""
    if _CUDA in active or device.startswith(("cpu", "mps")) or _warned.is_set():
        return
    import onnxruntime

    offered = _CUDA in onnxruntime.get_available_providers()
    torch = sys.modules.get("torch")  # no reason to spend seconds on importing it
    has_gpu = torch is not None and torch.cuda.is_available()
    if not (offered or has_gpu or device.startswith("cuda")):
        return
    _warned.set()
    if offered:
        cure = (
            "its CUDA provider did not load, most often because cuDNN or CUDA of another version is installed: "
            '`pip install "onnxruntime-gpu[cuda,cudnn]"`, and see `idgen doctor`'
        )
    else:
        cure = (
            "the installed onnxruntime has no CUDA provider: `pip uninstall -y onnxruntime onnxruntime-gpu`, then "
            "`pip install onnxruntime-gpu` (the two must not be installed together)"
        )
    warnings.warn(f"Faces are found and recognised on the CPU; {cure}.", RuntimeWarning, stacklevel=3)


def _onnx_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.onnx") if file.is_file())
