"""A keypoint drawing decides the size of a picture for which none is given: within the server's bounds."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idgen.errors import BadRequest
from idgen.keypoints import draw_keypoints
from idgen.request import Request
from tests.serving import PLAIN, photo, png, running

FIVE = np.array([[20, 24], [44, 24], [32, 36], [24, 46], [40, 46]], np.float32)


def drawing(width: int, height: int) -> Image.Image:
    return draw_keypoints((width, height), FIVE)


def test_only_a_drawing_without_a_size_decides_one() -> None:
    assert Request.create(pose=drawing(101, 64)).drawn_size() == (96, 64)
    assert Request.create(pose=png(drawing(64, 101))).drawn_size() == (64, 96)
    for fields in ({}, {"pose": FIVE}, {"pose": photo()}, {"pose": drawing(64, 64), "height": 64}):
        assert Request.create(**fields).drawn_size() is None
    for size in ((15, 64), (64, 4104)):
        with pytest.raises(BadRequest, match="16 to 4096 a side: give width and height") as caught:
            Request.create(pose=drawing(*size)).drawn_size()
        assert caught.value.field == "pose"


def test_the_size_that_a_drawing_decides_keeps_to_the_servers_bound(tmp_path: Path) -> None:
    order = {"prompt": "x", "pipeline": "instantid", "photos": [coded(photo())], "steps": 2, "seed": 1}
    with running(tmp_path, pipelines=("instantid", PLAIN), max_side=80) as server, server.client() as client:
        refused = client.post("/v1/portraits", json={**order, "pose": coded(png(drawing(72, 96)))})
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert error["param"] == "pose" and "72 x 96" in error["message"] and "at most 80" in error["message"]
        assert server.engine.stats().images == 0
        for size in ({}, {"width": 64, "height": 64}):
            pose = coded(png(drawing(72, 80) if not size else drawing(72, 96)))
            made = client.post("/v1/portraits", json={**order, **size, "pose": pose})
            assert made.status_code == 200, made.text
        unsized = client.post("/v1/portraits", json={**order, "pose": coded(photo())})  # 240 pixels, and no drawing
        assert unsized.status_code == 200, unsized.text


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()
