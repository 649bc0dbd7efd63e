"""Tiny face model packs for tests: real ONNX files that insightface routes and runs like the public ones.

The detector finds rectangles of pure magenta, cyan or yellow (one face per colour, on strides 8, 16 and 32) whose
sides are 16 to 400 pixels at its input and which fill less than 60 % of it: so it misses small faces, huge faces and
tight crops, as real detectors do. The recogniser's embedding is linear in the crop's pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image, ImageDraw

PEOPLE = {"magenta": (255, 0, 255), "cyan": (0, 255, 255), "yellow": (255, 255, 0)}
POINTS = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]], np.float32)
SCORES = (0.9, 0.8, 0.7)
FACE = (100, 100, 220, 260)
"""Where the magenta person of `group` is."""


class _Graph:
    """Collects ONNX nodes: `graph("Add", a, b)` returns the name of the sum, constants may be plain numbers."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: Any, **attributes: Any) -> str:
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        output = attributes.pop("output", f"{op}_{len(self.nodes)}")
        # No name on the node: insightface reads names that begin with Sub and Mul as a sign of other input scaling.
        self.nodes.append(helper.make_node(op, names, [output], **attributes))
        return output

    def constant(self, value: Any) -> str:
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        self.constants.append(numpy_helper.from_array(array, f"constant_{len(self.constants)}"))
        return self.constants[-1].name


def detector(path: Path, size: int | None = None, outputs: int = 9) -> Path:
    """Write a SCRFD-like detector; `size` fixes its input, `outputs=6` leaves the keypoints away."""
    g = _Graph()
    names: dict[str, list[str]] = {"score": [], "bbox": [], "kps": []}
    for stride, colour, score in zip((8, 16, 32), PEOPLE.values(), SCORES):
        window = {"kernel_shape": [stride, stride], "strides": [stride, stride]}
        wanted = np.array([1.0 if value else -1.0 for value in colour]).reshape(1, 3, 1, 1)
        hit = g("Greater", g("Conv", "x", g.constant(wanted)), 2.9)
        on = g("Cast", hit, to=1)
        ones = g("Cast", g("Equal", on, on), to=1)
        x_end, y_end = g("CumSum", ones, 3), g("CumSum", ones, 2)
        xs, ys = g("Sub", x_end, 1.0), g("Sub", y_end, 1.0)
        x1, y1 = (g("ReduceMin", g("Where", hit, each, 1e4), keepdims=0) for each in (xs, ys))
        x2, y2 = (g("ReduceMax", g("Where", hit, each, -1e4), keepdims=0) for each in (x_end, y_end))
        wide, tall = g("Sub", x2, x1), g("Sub", y2, y1)
        sized = g("And", g("Greater", wide, 15.0), g("Less", wide, 401.0))
        seen = g("And", sized, g("Less", g("ReduceMean", on, keepdims=0), 0.6))
        fired = g("Mul", g("Mul", g("MaxPool", on, **window), score), g("Cast", seen, to=1))
        flat = g("Reshape", fired, [-1, 1])
        cx, cy = (g("Reshape", g("AveragePool", each, **window), [-1, 1]) for each in (xs, ys))
        cx, cy = (g("Sub", each, (stride - 1) / 2) for each in (cx, cy))  # an anchor is its cell's first corner
        box = g("Concat", g("Sub", cx, x1), g("Sub", cy, y1), g("Sub", x2, cx), g("Sub", y2, cy), axis=1)
        px = g("Sub", g("Add", g("Mul", wide, POINTS[None, :, 0]), x1), cx)
        py = g("Sub", g("Add", g("Mul", tall, POINTS[None, :, 1]), y1), cy)
        pairs = g("Concat", g("Unsqueeze", px, [2]), g("Unsqueeze", py, [2]), axis=2)
        for kind, value, columns in (("score", flat, 1), ("bbox", box, 4), ("kps", g("Reshape", pairs, [-1, 10]), 10)):
            value = value if kind == "score" else g("Div", value, float(stride))
            both = g("Concat", value, value, axis=1)  # two anchors a cell
            names[kind].append(g("Reshape", both, [-1, columns], output=f"{kind}{stride}"))
    values = [
        helper.make_tensor_value_info(name, 1, [f"n_{name}", columns])
        for kind, columns in (("score", 1), ("bbox", 4), ("kps", 10))
        for name in names[kind]
    ][:outputs]
    sides = [size, size] if size else ["H", "W"]
    graph = helper.make_graph(
        g.nodes, "scrfd", [helper.make_tensor_value_info("x", 1, [1, 3, *sides])], values, g.constants
    )
    return _write(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def recogniser(
    path: Path, seed: int = 0, outputs: int = 512, batch: int | str = "n", reshape: bool = False, side: int = 112
) -> Path:
    """Write an ArcFace-like recogniser; another seed makes embeddings that do not interchange.

    batch: what the graph says of its batch axis. reshape: inside, it is made for one crop all the same. side: of the
    crop in pixels; with 192 insightface takes it for landmarks.
    """
    pooled = 3 * (side // 28) ** 2
    weights = np.random.default_rng(seed).normal(size=(pooled, outputs)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["input.1"], ["pooled"], kernel_shape=[28, 28], strides=[28, 28]),
        helper.make_node("Reshape", ["pooled", "one"], ["flat"])
        if reshape
        else helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "arcface",
        [helper.make_tensor_value_info("input.1", onnx.TensorProto.FLOAT, [batch, 3, side, side])],
        [helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, [batch, outputs])],
        [
            numpy_helper.from_array(weights, "weights"),
            *([numpy_helper.from_array(np.array([1, pooled]), "one")] if reshape else []),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return _write(model, path)


def _write(model: onnx.ModelProto, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def pack(folder: Path, size: int | None = None) -> Path:
    """Write a whole pack: det.onnx and rec.onnx."""
    detector(folder / "det.onnx", size)
    recogniser(folder / "rec.onnx")
    return folder


def photo(size: tuple[int, int], **people: tuple[int, int, int, int]) -> Image.Image:
    """Return a grey photo with each person's rectangle (left, top, right, bottom; right and bottom excluded)."""
    picture = Image.new("RGB", size, (90, 90, 90))
    draw = ImageDraw.Draw(picture)
    for name, (left, top, right, bottom) in people.items():
        draw.rectangle((left, top, right - 1, bottom - 1), fill=PEOPLE[name])
    return picture


def group() -> Image.Image:
    """Return a photo of all three people: yellow is the largest, then magenta, then cyan."""
    return photo((640, 480), magenta=FACE, cyan=(300, 50, 350, 120), yellow=(400, 200, 600, 420))
