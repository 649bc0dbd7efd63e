"""Faces a second: detection, recognition, both; photo by photo and many at once; on every processor that is here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from idgen.bench.photos import photos


def face_rows(devices: tuple[str, ...] = ("cpu",), count: int = 16, rounds: int = 3) -> Iterator[dict[str, Any]]:
    """One row for each way of doing it, with the execution provider that did it. Wall-clock time, since threads and the
    GPU are what is measured; the two ways of each pair take turns.

    The pack is the best one that is here: antelopev2, buffalo_l, else mini's, which is much smaller.
    """
    from idgen.api import default_extractor
    from idgen.faces import FaceExtractor

    default = default_extractor()
    pictures = photos(count)
    for device in devices:
        # A cache of one photo: every look is a look.
        extractor = FaceExtractor(default.pack, default.recogniser, device=device, cache_size=1)
        provider = extractor.providers[0]
        if device == "cuda" and not provider.startswith("CUDA"):
            yield {"kind": "faces", "variant": "on CUDA", "skipped": "onnxruntime's CUDA provider is not here"}
            continue
        crops = [extractor.face(picture).crop(extractor.input_size) for picture in pictures]
        arrays = [np.asarray(picture) for picture in pictures]
        ways: dict[str, Callable[[], Any]] = {
            "detection, one by one": lambda: [extractor.detector.detect(array) for array in arrays],  # noqa: B023
            "recognition, one by one": lambda: [extractor.embed(crop) for crop in crops],  # noqa: B023
            "recognition, in one run": lambda: extractor.embed_many(crops),  # noqa: B023
            "detection and recognition, one by one": lambda: [extractor.faces(p) for p in pictures],  # noqa: B023
            "detection and recognition, many at once": lambda: list(extractor.extract_many(pictures)),  # noqa: B023
        }
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                if number:
                    spent[name].append(time.perf_counter() - begin)
        for name, seconds in spent.items():
            yield {
                "kind": "faces",
                "variant": f"{name}, {extractor.pack.name}, {provider}",
                "faces_s": round(count / statistics.median(seconds), 1),
                "photos": count,
                "provider": provider,
            }
