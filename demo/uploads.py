"""What a browser may name as a file: what it uploaded, and nothing else of this machine or of the network.

Gradio checks that too, but only in an app that it launched itself, not in one that is mounted into another; and of
web addresses it refuses private ones only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from gradio_client.utils import is_file_obj, traverse


def refuse_strange_files(inputs: Any) -> None:
    """Look through what a page or a client sent for files that were not uploaded, or not made here.

    inputs: JSON. Raises gr.Error, which is shown as a toast.
    """
    traverse(inputs, _refuse, is_file_obj)


def _refuse(file: dict[str, Any]) -> dict[str, Any]:
    try:
        # A web address is no path inside any folder, so it is refused here too.
        uploaded = Path(file["path"]).resolve().is_relative_to(Path(get_upload_folder()).resolve())
    except (OSError, ValueError):  # a null byte, or a loop of links
        uploaded = False
    if not uploaded:
        raise gr.Error("Upload the file itself: this page opens no paths and no web addresses.", print_exception=False)
    return file


class Blocks(gr.Blocks):
    """A page that takes uploaded files only."""

    async def preprocess_data(self, block_fn: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """As Gradio's, after :func:`refuse_strange_files`."""
        refuse_strange_files(inputs)
        return await super().preprocess_data(block_fn, inputs, *args, **options)
