"""Small differences between the versions of diffusers that idgen supports."""

from __future__ import annotations

from typing import Any


def dtype_option(dtype: Any) -> dict[str, Any]:
    """The argument by which ``from_pretrained`` takes a dtype: diffusers 0.42 renamed ``torch_dtype`` to ``dtype``."""
    import diffusers
    from packaging.version import Version

    return {"dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": dtype}
