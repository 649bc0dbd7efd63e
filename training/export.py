"""ONNX files of mini's face models, in the layout that insightface's ``FaceAnalysis`` routes.

``FaceAnalysis`` tells models apart by their shape (insightface/model_zoo/model_zoo.py): five outputs or more make a
SCRFD detector; one 112x112 input makes an ArcFace recogniser, with mean and deviation 127.5 unless early nodes are
named ``Sub`` and ``Mul``. A pack is a folder; it takes the first model of each kind, so the scorer has its own.

    python -m idgen.training.export runs/mini weights/mini/faces

Needs the ``onnx`` package (extra ``dev``).
"""

from __future__ import annotations

import argparse
import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .detector import STRIDES, Detector, load_detector
from .facedata import CROP
from .recogniser import load_recogniser

OPSET = 13
RENAMED = {"Sub": "Minus", "Mul": "Times"}
"""insightface reads node names that begin with these as "normalises by itself" and would feed 0..255."""


def fold_batch_norms(net: nn.Module) -> nn.Module:
    """A copy of ``net`` in eval mode whose convolutions have taken in the batch norms that follow them."""
    net = copy.deepcopy(net).eval()
    for parent in [m for m in net.modules() if isinstance(m, nn.Sequential)]:
        names = list(parent._modules)
        for first, second in pairwise(names):
            conv, norm = parent._modules[first], parent._modules[second]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                parent._modules[first] = torch.nn.utils.fuse_conv_bn_eval(conv, norm)
                parent._modules[second] = nn.Identity()
    return net


def _export(
    net: nn.Module, example: Tensor, path: Path, outputs: list[str], dynamic: dict[str, dict[int, str]]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        net, (example,), str(path), input_names=["input"], output_names=outputs, dynamic_axes=dynamic,
        opset_version=OPSET, dynamo=False,
    )  # fmt: skip
    _shrink(path)


def _shrink(path: Path) -> None:
    """Store the weights in half precision with a cast to float behind each, and rename nodes that insightface misreads.

    The sums stay in float: only the file is smaller. onnxruntime folds the casts when it loads the model.
    """
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    model: Any = onnx.load(str(path))
    casts = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < 64:
            continue
        name = tensor.name
        half = numpy_helper.from_array(values.astype(np.float16), name + "_half")
        tensor.CopyFrom(half)
        widen = helper.make_node("Cast", [name + "_half"], [name], name="Widen_" + name, to=onnx.TensorProto.FLOAT)
        casts.append(widen)
    nodes = [*casts, *model.graph.node]
    for node in nodes:
        for bad, good in RENAMED.items():
            if node.name.lstrip("/_").startswith(bad):
                node.name = good + node.name
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def export_recogniser(net: nn.Module, path: Path) -> None:
    """A recogniser: input [batch, 3, 112, 112], ``(pixel - 127.5) / 127.5`` RGB; output ``embedding`` [batch, 512]."""
    _export(
        fold_batch_norms(net), torch.zeros(1, 3, CROP, CROP), path, ["embedding"],
        {"input": {0: "batch"}, "embedding": {0: "batch"}},
    )  # fmt: skip


def export_detector(net: Detector, path: Path) -> None:
    """The detector: input [1, 3, H, W] with H and W any multiple of 32, ``(pixel - 127.5) / 128`` RGB; nine outputs."""
    names = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES]
    axes = {name: {0: f"anchors_{name}"} for name in names}
    _export(
        fold_batch_norms(net), torch.zeros(1, 3, 128, 128), path, names, {"input": {2: "height", 3: "width"}, **axes}
    )  # fmt: skip


def export_all(checkpoints: Path, faces: Path) -> list[Path]:
    """Export what exists of detector.pt, recogniser.pt and scorer.pt in ``checkpoints``; returns the files written."""
    written = []
    for name, target in (
        ("detector", faces / "mini" / "detector.onnx"),
        ("recogniser", faces / "mini" / "recogniser.onnx"),
        ("scorer", faces / "scorer" / "scorer.onnx"),
    ):
        source = checkpoints / f"{name}.pt"
        if not source.exists():
            continue
        if name == "detector":
            export_detector(load_detector(source), target)
        else:
            export_recogniser(load_recogniser(source), target)
        written.append(target)
    return written


def main() -> None:
    """Command line: checkpoint folder, target folder."""
    parser = argparse.ArgumentParser(description="Export mini's face models to ONNX.")
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("faces", type=Path)
    options = parser.parse_args()
    for path in export_all(options.checkpoints, options.faces):
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
