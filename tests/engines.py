"""Requests for an engine of tiny models, what the pipeline makes of them alone, and a loader that can be held up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from idgen.pipeline import Pipeline
from idgen.request import Request
from tests import tiny

PIPELINE = "ip-adapter-faceid-plusv2"


class Gate:
    """A loader whose first call waits, so that a test can fill the queue first."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.loads = 0

    def __call__(self, name: str) -> Pipeline:
        self.loads += 1
        assert self.open.wait(30)
        return tiny.shared(PIPELINE if name == "auto" else name)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.open.set()


def order(number: int, **fields: Any) -> Request:
    given = {"who": tiny.person(number), "prompt": f"portrait {number}", "pipeline": PIPELINE, "seed": number}
    return Request.create(**{**given, **tiny.SMALL, **fields})


def alone(request: Request) -> list[np.ndarray]:
    """What the pipeline makes of the request without an engine."""
    return [np.asarray(p.image, np.int16) for p in tiny.shared(PIPELINE).generate_many([request])[0]]


def assert_same_pictures(portraits: Any, expected: list[np.ndarray]) -> None:
    """Equal but for the rounding of another batch size."""
    assert len(portraits) == len(expected)
    for portrait, image in zip(portraits, expected):
        assert np.abs(np.asarray(portrait.image, np.int16) - image).max() <= 2


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
