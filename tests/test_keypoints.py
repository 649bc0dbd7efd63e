"""Drawings: InstantID's control image to the pixel, and the picture of the faces found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from idgen.errors import BadRequest
from idgen.keypoints import draw_faces, draw_keypoints
from tests.conftest import BUNDLED_PARITY, SHARED_PARITY

FACE = [[76.5, 92.2], [147.4, 90.8], [112.1, 131.7], [81.9, 168.3], [142.6, 167.0]]


def _references(root: Path) -> Iterator[tuple[Path, list[int], list[list[float]]]]:
    """The drawings that InstantID's own code made: file, width and height, keypoints."""
    folder = root / "instantid"
    for file in sorted(folder.glob("cases/*.json")):
        case = json.loads(file.read_text())
        yield file.parent / case["control_image_file"], case["kps"]["size"], case["kps"]["kps"]
    for file in folder.glob("kps/kps.json"):
        for case in json.loads(file.read_text()).values():
            yield file.parent / case["file"], case["size_wh"], case["kps"]


@pytest.mark.parametrize(
    "root",
    [
        pytest.param(BUNDLED_PARITY, id="bundled"),
        pytest.param(
            SHARED_PARITY,
            id="shared",
            marks=pytest.mark.skipif(
                not SHARED_PARITY.is_dir(),
                reason="no shared/parity beside this checkout: put the developers' parity packs there",
            ),
        ),
    ],
)
def test_every_reference_drawing_is_reproduced_to_the_pixel(root):
    references = list(_references(root))
    assert {file.parent.name for file, _, _ in references} == (
        {"cases"} if root == BUNDLED_PARITY else {"cases", "kps"}
    )
    for file, size, points in references:
        golden = np.asarray(Image.open(file).convert("RGB"))
        for keypoints in (points, np.array(points)):
            drawn = np.asarray(draw_keypoints(tuple(size), keypoints))
            assert drawn.shape == golden.shape and np.array_equal(drawn, golden), file.name


def test_discs_are_in_full_colour_at_the_keypoints_and_sticks_are_dimmed():
    drawn = np.asarray(draw_keypoints((224, 224), FACE))
    colours = [tuple(int(v) for v in drawn[int(y), int(x)]) for x, y in FACE]
    assert colours == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    assert {tuple(int(v) for v in pixel) for pixel in drawn.reshape(-1, 3)} >= {(153, 0, 0), (0, 153, 0), (0, 0, 0)}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5000, 5000), min_size=10, max_size=10), st.integers(1, 80), st.integers(1, 80))
def test_points_anywhere_give_a_picture_of_the_asked_size(values, width, height):
    assert draw_keypoints((width, height), np.array(values).reshape(5, 2)).size == (width, height)


@pytest.mark.parametrize(
    "points",
    [[[1, 2]] * 4, [[1, 2, 3]] * 5, [[1, float("nan")]] * 5, [[1, 1e12]] * 5, [["a", "b"]] * 5, [[1], [1, 2]], None],
)
def test_keypoints_that_are_not_five_finite_pairs_are_refused_by_name(points):
    with pytest.raises(BadRequest) as caught:
        draw_keypoints((64, 64), points)
    assert caught.value.field == "keypoints"


@pytest.mark.parametrize("size", [(0, 64), (64, -1), (64, 40_000)])
def test_a_drawing_without_a_sensible_size_is_refused(size):
    with pytest.raises(BadRequest) as caught:
        draw_keypoints(size, FACE)
    assert caught.value.field == "size"


@dataclass
class _Seen:
    box: np.ndarray
    keypoints: np.ndarray
    score: float = 0.87


@pytest.mark.parametrize("scale", [0.15, 1, 8])
def test_faces_are_marked_on_a_copy_with_box_points_and_label_at_any_size(scale):
    side = round(240 * scale)
    photo = Image.new("RGB", (side, side), (90, 90, 90))
    box = np.array([60, 60, 180, 200], np.float32) * scale
    points = np.array(FACE, np.float32) * scale
    drawn = np.asarray(draw_faces(photo, [_Seen(box, points)])).astype(int)
    assert photo.getcolors() == [(side * side, (90, 90, 90))]
    zoom = drawn.shape[0] / side
    assert zoom == int(zoom) and min(drawn.shape[:2]) >= 320, "thumbnails are enlarged"
    scale, box, points = scale * zoom, box * zoom, points * zoom
    lime = (drawn == (0, 255, 0)).all(-1)
    middle = slice(round(box[1]) + 2, round(box[3]) - 2)
    left_edge = lime[middle, max(0, round(box[0]) - 3) : round(box[0]) + round(4 * scale) + 3].any(1)
    assert left_edge.mean() > 0.9, "the left edge of the box is drawn"
    assert tuple(drawn[int(points[2, 1]), int(points[2, 0])]) == (0, 0, 255), "the nose is blue"
    label = (drawn == 0).all(-1)[: round(box[1])].sum()
    assert label > 20, "there is a label above the box"


def test_a_label_stays_inside_the_picture_when_the_face_touches_its_corner():
    def label(left: int) -> int:
        seen = _Seen(np.array([left, 30, left + 90, 120], np.float32), np.full((5, 2), 200, np.float32))
        above = np.asarray(draw_faces(Image.new("RGB", (400, 400), "grey"), [seen]))[:27]
        return int((above != 128).any(-1).sum())

    assert label(200) > 300
    for left in (380, -60):
        assert label(left) == pytest.approx(label(200), rel=0.05), "whole, though the face reaches over the edge"
    corner = _Seen(np.array([380, -20, 460, 60], np.float32), np.full((5, 2), 200, np.float32))
    drawn = np.asarray(draw_faces(Image.new("RGB", (400, 400), "grey"), [corner]))
    assert (drawn[:30] == 0).all(-1).sum() > 200, "also where there is no room above the box"
