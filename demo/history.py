"""The History tab: every portrait of this page, and of no other."""

from __future__ import annotations

from typing import Any

import gradio as gr

from idgen.demo.create import Create
from idgen.demo.page import QUIET, Page
from idgen.demo.session import Session, likeness


def history_tab(page: Page, tab: gr.Tab, tabs: gr.Tabs, create: Create) -> None:
    """Build the tab inside the current container."""
    gr.Markdown("### This session", elem_classes="idgen-title")
    gr.Markdown(
        "Everything you made since you opened this page. It belongs to this page alone and is gone when you close or "
        "reload it: download what you want to keep. Click a portrait to open it in Create.",
        elem_classes="idgen-note",
    )
    shelf = gr.Gallery(
        label="Portraits of this session",
        show_label=False,
        elem_id="history",
        columns=5,
        allow_preview=False,
        interactive=False,
        object_fit="cover",
        buttons=[],
    )
    empty = gr.Markdown("Nothing here yet.", elem_id="history-empty")
    clear = gr.Button("Delete everything", elem_id="clear", size="sm", variant="secondary")

    def listed(session: Session) -> tuple[Any, Any]:
        items = [
            (session.path(shot), f"{likeness(shot.portrait.likeness)}\n{shot.request.pipeline}")
            for shot in reversed(session.shots)
        ]
        return gr.Gallery(value=items, visible=bool(items)), gr.Markdown(visible=not items)

    def reopen(session: Session, event: gr.SelectData) -> dict[Any, Any]:
        newest_first = session.shots[::-1]
        session.gallery = newest_first[event.index : event.index + 1]
        session.selected = 0
        return {tabs: gr.Tabs(selected="create"), **create.show(session)}

    def forget(session: Session) -> dict[Any, Any]:
        session.forget()
        items, note = listed(session)
        return {shelf: items, empty: note, **create.show(session)}

    tab.select(listed, page.session, [shelf, empty], **QUIET)
    shelf.select(reopen, page.session, [tabs, *create.outputs], **QUIET)
    clear.click(forget, page.session, [shelf, empty, *create.outputs], **QUIET)
