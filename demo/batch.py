"""The Batch tab: a prompt file in, a zip of portraits out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from idgen.demo import panels, prompts
from idgen.demo.orders import person
from idgen.demo.page import QUIET, Page
from idgen.demo.session import Session
from idgen.demo.work import toasts
from idgen.errors import BadRequest

HELP = f"""
`.txt` (one prompt a line), `.csv`, `.jsonl` or `.yaml`. Rows may set any field: `prompt`, `photo`, `pipeline`, `n`,
`seed`, `steps`, `size` … Rows without a photo show the person on this page; a `photo` is one of the files you add here,
by its name.

```
{prompts.EXAMPLE}```
"""


def batch_tab(page: Page) -> None:
    """Build the tab inside the current container."""
    ready = [offer.name for offer in page.ready]
    gr.Markdown("### Many portraits from a prompt file", elem_classes="idgen-title")
    with gr.Row(equal_height=True):
        file = gr.File(
            label="Prompt file",
            elem_id="batch-file",
            file_types=[".txt", ".csv", ".jsonl", ".yaml", ".yml"],
            height=160,
            min_width=240,
        )
        photos = gr.File(
            label="Photos that it names (optional)",
            elem_id="batch-photos",
            file_count="multiple",
            file_types=["image"],
            height=160,
            min_width=240,
        )
        pipeline = gr.Dropdown(
            ready, value=ready[0] if ready else None, label="Pipeline", info="for rows that name none", min_width=200
        )
    with gr.Accordion("What goes into a prompt file", open=False):
        gr.Markdown(HELP)
    with gr.Row():
        sample = gr.Button("Use an example file", elem_id="batch-example", size="lg", scale=1, min_width=160)
        go = gr.Button("Render all", variant="primary", elem_id="batch", size="lg", scale=3, min_width=160)
        stop = gr.Button(
            "Cancel", variant="stop", elem_id="batch-cancel", size="lg", visible=False, scale=1, min_width=110
        )
    status = gr.HTML(elem_id="batch-status", padding=False)
    download = gr.DownloadButton("Download the zip", elem_id="batch-zip", visible=False, variant="primary")
    gallery = gr.Gallery(
        label="Newest first",
        show_label=False,
        elem_id="batch-gallery",
        columns=6,
        visible=False,
        interactive=False,
        object_fit="cover",
        buttons=["fullscreen"],
    )
    table = gr.HTML(elem_id="batch-table", padding=False)

    def run(
        session: Session, page_photos: list[Any] | None, path: str | None, uploads: list[str] | None, name: str | None
    ) -> Iterator[dict[Any, Any]]:
        session.begin()
        rest = {go: gr.Button(interactive=True), stop: gr.Button(visible=False)}
        yield {
            go: gr.Button(interactive=False),
            stop: gr.Button(visible=True),
            download: gr.DownloadButton(visible=False),
            status: panels.waiting("Reading the prompt file"),
        }
        try:
            with toasts():
                if not path:
                    raise BadRequest("upload a prompt file first, or take the example.", "file")
                if not name:
                    raise BadRequest("no pipeline can run here: its weights are missing.", "pipeline")
                sittings = page.look(session, page_photos)
                items = prompts.read(
                    path,
                    {Path(each).name: each for each in uploads or []},
                    lambda wanted: person(sittings, page.offer(wanted)),
                    name,
                    ready,
                    page.engine.limits,
                )
                folder = session.new_folder("batch")
                for state in prompts.render(session, page.engine, items, folder):
                    yield {
                        status: panels.working("Rendering", state.done, state.total, state.eta_s, unit="image"),
                        gallery: gr.Gallery(value=state.newest, visible=bool(state.newest)),
                        table: panels.rows(state.records),
                    }
                packed = prompts.pack(items, folder, Path(path).stem)
        except gr.Error:
            yield {status: panels.finished("That did not work; the message says why.", "failed"), **rest}
            raise
        records = [record for item in items for record in item.records]
        done = sum(record["file"] is not None for record in records)
        failed = sum(record["file"] is None for record in records)
        words = f"{done} images" + (f", {failed} rows failed" if failed else "") + "."
        stopped = session.cancelled
        yield {
            status: panels.finished(("Stopped. " if stopped else "") + words, "stopped" if stopped else "done"),
            table: panels.rows(records),
            download: gr.DownloadButton(value=str(packed), visible=done > 0),
            **rest,
        }

    def example(session: Session) -> str:
        target = session.new_folder("example") / "prompts.txt"
        target.write_text(prompts.EXAMPLE, encoding="utf-8")
        return str(target)

    go.click(
        run,
        [page.session, page.photos, file, photos, pipeline],
        [status, gallery, table, download, go, stop],
        concurrency_limit=None,
        **{**QUIET, "api_visibility": "public", "api_name": "batch"},
    )
    stop.click(Session.cancel, page.session, None, queue=False, **QUIET)
    sample.click(example, page.session, file, **QUIET)
