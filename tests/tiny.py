"""Tiny random models in the public formats, from the bundled parity packs: for tests that need no real portrait."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

import idgen
from idgen.backbone import Backbone
from idgen.pipeline import Pipeline
from tests.conftest import BUNDLED_PARITY as ROOT

SDXL, SD15 = ROOT / "bases/sdxl", ROOT / "bases/sd15"
FACEID = ROOT / "faceid_plus_sdxl/checkpoint/ip-adapter-faceid-plusv2_sdxl.bin"
INSTANTID = ROOT / "instantid/checkpoint"
IP_ADAPTER = ROOT / "ip_adapter_sd15/checkpoint/ip-adapter_sd15.bin"
ENCODER = ROOT / "bases/image_encoder"

FILES = {
    "ip-adapter": {"adapter": IP_ADAPTER, "image_encoder": ENCODER},
    "ip-adapter-faceid-plusv2": {"adapter": FACEID, "image_encoder": ENCODER},
    "instantid": {"adapter": INSTANTID / "ip-adapter.bin", "controlnet": INSTANTID / "ControlNetModel"},
}
SMALL = {"width": 64, "height": 64, "steps": 3}


def backbone(family: str = "sdxl") -> Backbone:
    """A fresh one: a test that changes it harms no other."""
    return Backbone.load(SDXL if family == "sdxl" else SD15, device="cpu", dtype="float32")


def load(name: str, base: Backbone | None = None) -> Pipeline:
    base = base or backbone("sd15" if name == "ip-adapter" else "sdxl")
    return idgen.load(name, base=base, **FILES.get(name, {}))


@lru_cache(maxsize=4)
def shared(name: str) -> Pipeline:
    """One for all tests that leave it as it is."""
    return load(name)


def person(seed: int = 0) -> idgen.Identity:
    """Somebody: a random embedding, a random crop, keypoints in the middle."""
    rng = np.random.default_rng(seed)
    points = np.array([[22, 26], [42, 26], [32, 36], [25, 46], [39, 46]], np.float32)
    crop = Image.fromarray(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8))
    return idgen.Identity(rng.normal(size=512), points, crop, name=f"person {seed}", keypoints_size=(64, 64))
