"""Where the files behind a manifest entry lie on this machine; the bundled mini set is always here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from idgen.errors import WeightsMissing

MINI = {
    "mini-xl": "mini-xl",
    "mini-sd15": "mini-sd15",
    "mini-faces": "faces/mini",
    "mini-scorer": "faces/scorer/scorer.onnx",
    "mini-image-encoder": "image_encoder",
    "ip-adapter-faceid_mini-xl": "ip-adapter-faceid_mini-xl.safetensors",
    "ip-adapter-faceid-plusv2_mini-xl": "ip-adapter-faceid-plusv2_mini-xl.safetensors",
    "instantid_mini-xl": "instantid",
    "arc2face_mini-sd15": "arc2face",
}
"""entry -> path inside ``weights/mini``"""


def locate(entry: str) -> Path:
    """The file or folder of an entry.

    Raises:
        WeightsMissing: it is not here; the message names the command that gets it.
    """
    from idgen.weights.store import Store, mini_dir

    if entry in MINI:
        root = mini_dir()
        if root is None or not (root / MINI[entry]).exists():
            raise WeightsMissing(f"this copy of idgen comes without {entry!r} of the mini model set; reinstall idgen.")
        return root / MINI[entry]
    return Store().path(entry)


def is_commercial(entries: Iterable[str]) -> bool | str:
    """Whether all licences allow commercial use: True, False or ``"unclear"``."""
    from idgen.weights.manifest import load_manifest

    manifest = load_manifest()
    answers = [True if entry in MINI else manifest[entry].commercial for entry in entries]
    if False in answers:
        return False
    return True if all(answer is True for answer in answers) else "unclear"
