"""The service's limits on photos hold in every tab of the demo that is mounted into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from tests import facepacks
from tests.serving import FACEID, photo, png, running
from tests.test_service_demo import called, created, uploaded

LARGE = png(facepacks.photo((400, 300), magenta=(60, 60, 160, 180)))


def picture(client: httpx.Client, data: bytes, name: str = "photo.png") -> dict[str, Any]:
    """A picture as the page hands it in."""
    path = client.post("/gradio_api/upload", files={"files": (name, data)}).json()[0]
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def person(client: httpx.Client, *photos: bytes) -> list[Any]:
    """What the gallery of the person holds."""
    return [{"image": picture(client, each, f"{k}.png"), "caption": None} for k, each in enumerate(photos)]


def test_too_many_and_too_large_photos_are_refused_in_every_tab(tmp_path: Path) -> None:
    with running(tmp_path, demo=True, max_photos=2, max_pixels=300 * 300) as server, server.client() as client:
        file = uploaded(client, "a --size 64x64 --steps 2")
        many, large = person(client, *[photo()] * 3), person(client, LARGE)
        for photos, said in ((many, "3 photos; this server allows at most 2."), (large, "is too large: 400 x 300")):
            assert said in called(client, "generate", [photos, *created()[1:]])
            assert said in called(client, "compare", [photos, "x", "None", 1, 2, [FACEID]])
            assert said in called(client, "batch", [photos, file, None, FACEID])
        assert server.engine.stats().images == 0
        assert "1 portrait in" in called(client, "generate", [person(client, photo(), photo(62)), *created()[1:]])


def test_the_files_of_a_batch_and_a_pose_keep_to_the_limits_too(tmp_path: Path) -> None:
    rows = ["a --photo l.png", "b --photo 'a.png | a.png | a.png'", "c --pose l.png", "d --photo 'a.png | a.png'"]
    small = [f"{row} --size 64x64 --steps 2" for row in rows]
    with running(tmp_path, demo=True, max_photos=2, max_pixels=300 * 300) as server, server.client() as client:
        files = [picture(client, LARGE, "l.png"), picture(client, photo(), "a.png")]
        mine = person(client, photo())
        batch = called(client, "batch", [mine, uploaded(client, "\n".join(small)), files, FACEID])
        assert batch.count("is too large: 400 x 300") >= 2 and "3 photos; this server allows at most 2." in batch
        assert "1 images, 3 rows failed." in batch
