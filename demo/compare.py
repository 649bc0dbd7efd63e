"""The Compare tab: the same person, prompt and seed through several pipelines, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from idgen.demo import panels
from idgen.demo.create import Create
from idgen.demo.orders import person, roll
from idgen.demo.page import QUIET, Page
from idgen.demo.session import Session, Shot
from idgen.demo.styles import styles
from idgen.demo.work import Run, toasts
from idgen.errors import BadRequest, IdgenError
from idgen.request import Request


def compare_tab(page: Page, tab: gr.Tab, create: Create) -> None:
    """Build the tab inside the current container."""
    names = [offer.name for offer in page.ready]
    gr.Markdown("### Every pipeline, one person", elem_classes="idgen-title")
    gr.Markdown(
        "The same photo, prompt and seed through each pipeline, on models that stay loaded. "
        "Every pipeline keeps its own recommended settings; 0 steps means its own number.",
        elem_classes="idgen-note",
    )
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(label="Prompt", elem_id="compare-prompt", scale=4, min_width=240)
        style = gr.Dropdown(list(styles()), label="Style", elem_id="compare-style", scale=2, min_width=140)
        seed = gr.Number(label="Seed", precision=0, minimum=0, elem_id="compare-seed", scale=2, min_width=140)
        steps = gr.Slider(0, 100, 0, step=1, label="Steps", scale=2, min_width=180)
    which = gr.CheckboxGroup(names, value=names, label="Pipelines", elem_id="compare-pipelines")
    with gr.Row():
        go = gr.Button("Compare", variant="primary", elem_id="compare", size="lg", scale=3)
        stop = gr.Button(
            "Cancel", variant="stop", elem_id="compare-cancel", size="lg", visible=False, scale=1, min_width=110
        )
    status = gr.HTML(elem_id="compare-status", padding=False)
    gallery = gr.Gallery(
        label="Side by side",
        show_label=False,
        elem_id="compare-gallery",
        columns=4,
        visible=False,
        interactive=False,
        object_fit="contain",
        buttons=["fullscreen"],
        format="png",
    )
    table = gr.HTML(elem_id="compare-table", padding=False)

    def compare(
        session: Session,
        photos: list[Any] | None,
        prompt: str,
        style: str,
        seed: float | None,
        steps: int,
        chosen: list[str],
    ) -> Iterator[dict[Any, Any]]:
        session.begin()
        rest = {go: gr.Button(interactive=True), stop: gr.Button(visible=False)}
        yield {go: gr.Button(interactive=False), stop: gr.Button(visible=True), status: panels.waiting("Starting")}
        shots: list[Shot] = []
        items: list[tuple[str, str]] = []
        rows: list[tuple[str, float | None, float | None, str]] = []
        value = roll() if seed is None else int(seed)
        try:
            with toasts():
                if not chosen:
                    raise BadRequest("tick at least one pipeline.", "pipeline")
                sittings = page.look(session, photos)
                words, negative = (styles().get(style) or next(iter(styles().values()))).apply(prompt, "")
                for i, name in enumerate(chosen, 1):
                    offer = page.offer(name)
                    request = Request.create(
                        who=person(sittings, offer),
                        prompt=words,
                        negative_prompt=negative,
                        pipeline=name,
                        seed=value,
                        steps=int(steps) or None,
                    )
                    work = Run(session, page.engine, request, f"{name} ({i} of {len(chosen)})")
                    try:
                        for html in work.updates():
                            yield {status: html}
                    except IdgenError as error:  # one that cannot must not spoil the comparison of the others
                        if len(chosen) == 1:
                            raise
                        rows.append((name, None, None, str(error)))
                        yield {table: panels.comparison(rows)}
                        continue
                    if work.stopped:
                        break
                    made = session.keep(work.portraits, request, work.seconds)
                    shots += made
                    rows.append((name, made[0].portrait.likeness, work.seconds, ""))
                    items = [(session.path(shot), _caption(shot)) for shot in shots]
                    yield {gallery: gr.Gallery(value=items, visible=True), table: panels.comparison(rows)}
        except gr.Error:
            yield {status: panels.finished("That did not work; the message says why.", "failed"), **rest}
            raise
        done = f"{len(shots)} of {len(chosen)} pipelines compared, seed {value}."
        stopped = session.cancelled
        shown = {gallery: gr.Gallery(value=items, visible=True)} if items else {}
        yield {
            status: panels.finished(("Stopped. " if stopped else "") + done, "stopped" if stopped else "done"),
            **shown,  # again: a busy browser may have dropped the last pictures between two updates
            **rest,
        }

    def prefill(
        mine: str, theirs: str, my_style: str, their_style: str, my_seed: Any, their_seed: Any
    ) -> tuple[Any, ...]:
        """What Create holds, where this tab holds nothing yet."""
        return mine or theirs, my_style if mine else their_style, my_seed if mine else their_seed

    go.click(
        compare,
        [page.session, page.photos, prompt, style, seed, steps, which],
        [status, gallery, table, go, stop],
        concurrency_limit=None,
        **{**QUIET, "api_visibility": "public", "api_name": "compare"},
    )
    stop.click(Session.cancel, page.session, None, queue=False, **QUIET)
    tab.select(prefill, [prompt, create.prompt, style, create.style, seed, create.seed], [prompt, style, seed], **QUIET)


def _caption(shot: Shot) -> str:
    value = shot.portrait.likeness
    return f"{'–' if value is None else f'{value:.2f}'} · {shot.seconds:.1f} s\n{shot.request.pipeline}"
