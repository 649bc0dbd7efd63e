"""The Create tab: what to show, how, and the portraits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from idgen.demo import panels
from idgen.demo.orders import Settings, make_request, roll, variation
from idgen.demo.page import QUIET, Page
from idgen.demo.session import Session
from idgen.demo.styles import SIZES, styles
from idgen.demo.work import Run, toasts
from idgen.errors import BadRequest
from idgen.request import Request

IDEAS = {
    "red hat": ("a person smiling, wearing a red hat, blue background", "Studio photo"),
    "surprise": ("a person looking surprised, wearing a green shirt, orange background", "Studio photo"),
    "angry": ("a person looking angry, wearing glasses, yellow background", "None"),
    "pencil laugh": ("a person laughing", "Pencil sketch"),
}
"""Prompts and styles to start from; mini understands all of them."""
SCROLL = "() => { if (innerWidth < 900) document.getElementById('status').scrollIntoView({behavior: 'smooth'}) }"
"""On a phone the pictures are far below the button."""


@dataclass(eq=False)
class Create:
    """The tab's components that other tabs need."""

    prompt: gr.Textbox
    style: gr.Radio
    seed: gr.Number
    show: Callable[[Session], dict[Any, Any]]
    outputs: list[Any]


def create_tab(page: Page) -> Create:
    """Build the tab inside the current container."""
    with gr.Row(elem_classes="idgen-columns"):
        with gr.Column(scale=5, min_width=320):
            fields, go, stop, advanced = _controls(page)
        with gr.Column(scale=6, min_width=320, elem_id="results"):
            status = gr.HTML(panels.EMPTY, elem_id="status", padding=False)
            gallery = gr.Gallery(
                label="Portraits",
                show_label=False,
                elem_id="gallery",
                columns=2,
                visible=False,
                interactive=False,
                object_fit="contain",
                buttons=["fullscreen"],
                format="png",
            )
            facts = gr.HTML(elem_id="details", padding=False)
            with gr.Row(visible=False, elem_id="actions") as actions:
                more = gr.Button("More like this", elem_id="more", size="sm", min_width=100)
                pose = gr.Button("Use as pose", elem_id="use-pose", size="sm", min_width=100)
                again = gr.Button("Render again", elem_id="again", size="sm", min_width=100)
                save = gr.DownloadButton("Download", elem_id="download", size="sm", min_width=100)
    outputs = [status, gallery, facts, actions, save, go, stop, fields["seed"]]

    def selection(session: Session) -> dict[Any, Any]:
        shot = session.chosen
        return {
            facts: panels.details(shot),
            actions: gr.Row(visible=shot is not None),
            save: gr.DownloadButton(value=session.path(shot) if shot else None),
        }

    def results(session: Session) -> dict[Any, Any]:
        items = [(session.path(shot), shot.caption) for shot in session.gallery]
        return {gallery: gr.Gallery(value=items, visible=bool(items), selected_index=None), **selection(session)}

    def run(session: Session, make: Callable[[], Request], label: str) -> Iterator[dict[Any, Any]]:
        """Do one piece of work; whatever happens, the buttons come back."""
        session.begin()
        yield {go: gr.Button(interactive=False), stop: gr.Button(visible=True), status: panels.waiting("Starting")}
        rest = {go: gr.Button(interactive=True), stop: gr.Button(visible=False)}
        try:
            with toasts():
                request = make()
                work = Run(session, page.engine, request, label)
                for html in work.updates():
                    yield {status: html}
                if work.portraits:
                    session.gallery = session.keep(work.portraits, request, work.seconds)
                    session.selected = 0
        except gr.Error:
            yield {status: panels.finished("That did not work; the message says why.", "failed"), **rest}
            raise
        shown = results(session) if work.portraits else {}  # the page may be gone: write no files for it
        yield {status: work.summary, fields["seed"]: request.seed, **rest, **shown}

    def generate(
        session: Session,
        photos: list[Any] | None,
        prompt: str,
        style: str,
        pipeline: str,
        count: int,
        size: str,
        steps: int,
        guidance: float,
        identity_scale: float,
        structure_scale: float,
        negative: str,
        scheduler: str,
        random_seed: bool,
        seed: int | None,
        pose: str | None,
    ) -> Iterator[dict[Any, Any]]:
        # Spelt out, because these are the names by which programs call the endpoint.
        wanted = Settings(
            *(prompt, style, pipeline, count, size, steps, guidance, identity_scale, structure_scale),
            *(negative, scheduler, random_seed, seed, pose),
        )

        def make() -> Request:
            offer = page.offer(wanted.pipeline)
            sittings = page.look(session, photos)
            request = make_request(sittings, offer, page.engine, wanted)
            if request.pose is not None:
                page.engine.limits.photo(request.pose)
            return request

        yield from run(session, make, f"Painting with {wanted.pipeline}")

    def chosen(session: Session) -> Any:
        if session.chosen is None:
            raise BadRequest("choose a portrait in the gallery first.", "portrait")
        return session.chosen

    def like(session: Session, count: int) -> Iterator[dict[Any, Any]]:
        yield from run(session, lambda: variation(chosen(session), count), "Making more like this")

    def repeat(session: Session) -> Iterator[dict[Any, Any]]:
        yield from run(session, lambda: chosen(session).request, "Rendering again")

    def select(session: Session, event: gr.SelectData) -> dict[Any, Any]:
        session.selected = event.index
        return selection(session)

    def to_pose(session: Session) -> dict[Any, Any]:
        with toasts():
            shot = chosen(session)
            if not any(offer.name == "instantid" for offer in page.ready):
                offer = page.offer("instantid")
                raise BadRequest(f"only InstantID takes a pose, and it cannot run here: {offer.cure}", "pose")
        gr.Info("InstantID will place the face as in this portrait. Press Generate.")
        return {
            fields["pose"]: session.path(shot),
            fields["pipeline"]: "instantid",
            advanced: gr.Accordion(open=True),
        }

    work: dict[str, Any] = {**QUIET, "concurrency_limit": None}
    inputs = [page.session, page.photos, *(fields[each.name] for each in dataclasses.fields(Settings))]
    gr.on(
        [go.click, fields["prompt"].submit],
        generate,
        inputs,
        outputs,
        **{**work, "api_visibility": "public", "api_name": "generate"},
    )
    go.click(None, js=SCROLL, api_visibility="private")
    more.click(like, [page.session, fields["count"]], outputs, **work)
    again.click(repeat, page.session, outputs, **work)
    pose.click(to_pose, page.session, [fields["pose"], fields["pipeline"], advanced], **QUIET)
    gallery.select(select, page.session, [facts, actions, save], **QUIET)
    stop.click(Session.cancel, page.session, None, queue=False, **QUIET)
    return Create(fields["prompt"], fields["style"], fields["seed"], results, [gallery, facts, actions, save])


def _controls(page: Page) -> tuple[dict[str, Any], gr.Button, gr.Button, gr.Accordion]:
    """The fields by name, in the order of :class:`Settings`; the buttons; the drawer."""
    from idgen.schedulers import SCHEDULERS

    ready = page.ready
    first = ready[0] if ready else page.offers[0]
    fields: dict[str, Any] = {}
    gr.Markdown("### The portrait", elem_classes="idgen-title")
    fields["prompt"] = gr.Textbox(
        value="",
        label="Prompt",
        elem_id="prompt",
        lines=2,
        placeholder="a person smiling, wearing a red hat, blue background",
        info=_prompt_info(first),
    )
    fields["style"] = gr.Radio(list(styles()), value=next(iter(styles())), label="Style", elem_id="style")
    gr.Examples(
        [list(idea) for idea in IDEAS.values()],
        [fields["prompt"], fields["style"]],
        label="Ideas",
        elem_id="ideas",
        example_labels=list(IDEAS),
        preload=False,
        cache_examples=False,
        api_visibility="private",
    )
    fields["pipeline"] = gr.Radio(
        [(f"{offer.name} — {offer.description}", offer.name) for offer in ready],
        value=first.name if ready else None,
        label="Pipeline",
        elem_id="pipeline",
    )
    gr.HTML(panels.missing(page.offers), elem_id="missing", padding=False, visible=len(ready) < len(page.offers))
    with gr.Row(equal_height=True):
        fields["count"] = gr.Slider(1, 8, 2, step=1, label="Portraits", elem_id="count", min_width=140)
        fields["size"] = gr.Dropdown(list(SIZES), value=next(iter(SIZES)), label="Size", elem_id="size", min_width=140)
    with gr.Accordion("Advanced", open=False, elem_id="advanced") as advanced:
        with gr.Row():
            fields["steps"] = gr.Slider(1, 100, first.defaults.steps, step=1, label="Steps", elem_id="steps")
            fields["guidance"] = gr.Slider(0, 20, first.defaults.guidance, step=0.1, label="Guidance")
        with gr.Row():
            fields["identity_scale"] = gr.Slider(
                0, 1.5, first.defaults.identity_scale, step=0.05, label="Identity scale"
            )
            fields["structure_scale"] = gr.Slider(
                0,
                1.5,
                first.defaults.structure_scale,
                step=0.05,
                label="Structure scale",
                info="how firmly to place it",
            )
        fields["negative"] = gr.Textbox(
            value="", label="Negative prompt", elem_id="negative", placeholder="what to keep out"
        )
        with gr.Row():
            fields["scheduler"] = gr.Dropdown(
                ["default", *SCHEDULERS], value=first.defaults.scheduler or "default", label="Scheduler"
            )
            fields["random_seed"] = gr.Checkbox(True, label="New seed each time", elem_id="random-seed")
        with gr.Row(equal_height=True, elem_id="seed-row"):
            fields["seed"] = gr.Number(
                label="Seed", precision=0, minimum=0, elem_id="seed", scale=3, min_width=140, value=0
            )
            dice = gr.Button("⚄", elem_id="dice", scale=0, min_width=64)
        fields["pose"] = gr.Image(
            label="Pose photo (InstantID)", type="filepath", elem_id="pose", height=180, sources=["upload", "webcam"]
        )
    with gr.Row(elem_id="go-row"):
        go = gr.Button("Generate", variant="primary", elem_id="generate", size="lg", scale=3)
        stop = gr.Button("Cancel", variant="stop", elem_id="cancel", size="lg", visible=False, scale=1, min_width=110)

    def defaults(name: str) -> list[Any]:
        offer = page.offer(name)
        wanted = offer.defaults
        return [
            gr.Textbox(info=_prompt_info(offer)),
            wanted.steps,
            wanted.guidance,
            wanted.identity_scale,
            wanted.structure_scale,
            wanted.scheduler or "default",
        ]

    names = ("prompt", "steps", "guidance", "identity_scale", "structure_scale", "scheduler")
    fields["pipeline"].change(defaults, fields["pipeline"], [fields[name] for name in names], **QUIET)
    dice.click(lambda: (roll(), False), None, [fields["seed"], fields["random_seed"]], **QUIET)
    return fields, go, stop, advanced


def _prompt_info(offer: Any) -> str:
    return "what to show" if offer.takes_prompt else f"{offer.name} shows the face alone and does not read the prompt"
