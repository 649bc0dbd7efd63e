"""What all tabs share: the engine, the offers, the state of the page, the panel of the person."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from idgen.demo.orders import look
from idgen.demo.people import Sitting, describe
from idgen.demo.session import Session
from idgen.demo.work import toasts

if TYPE_CHECKING:
    from idgen.demo.limits import LimitedEngine
    from idgen.demo.offers import Offer
    from idgen.faces import FaceExtractor

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""For events of the page itself: our own progress is shown, and clients need not call them."""


@dataclass(eq=False)
class Page:
    """Handed to every tab."""

    engine: LimitedEngine
    offers: list[Offer]
    extractor: Callable[[], FaceExtractor]
    session: gr.State
    photos: gr.Gallery | None = None

    def offer(self, name: str) -> Offer:
        """The offer of that name. Raises BadRequest for a name that is not registered."""
        from idgen.registry import method

        method(name)
        return next(offer for offer in self.offers if offer.name == name)

    def look(self, session: Session, photos: Sequence[Any] | None) -> list[Sitting]:
        """The faces in the photos of the page's gallery, as :func:`idgen.demo.orders.look`."""
        return look(session, photos, self.extractor(), self.engine.limits) if photos else []

    @property
    def ready(self) -> list[Offer]:
        """The pipelines that can run here."""
        return [offer for offer in self.offers if offer.ready]


def examples() -> list[str]:
    """Photos of synthetic people that come with the package."""
    folder = files("idgen.demo") / "people"
    if not folder.is_dir():
        return []
    with as_file(folder) as path:
        return sorted(str(file) for file in Path(path).glob("*.jpg"))


def person_panel(page: Page) -> None:
    """Photos in, faces found, the right one picked. Sets ``page.photos``."""
    gr.Markdown("### The person", elem_classes="idgen-title")
    page.photos = gr.Gallery(
        label="Photos",
        elem_id="photos",
        sources=["upload", "webcam", "clipboard"],
        file_types=["image"],
        interactive=True,
        columns=3,
        fit_columns=False,
        height=230,
        object_fit="cover",
        buttons=[],
    )
    faces = gr.Image(
        label="Faces found",
        show_label=False,
        elem_id="faces",
        interactive=False,
        visible=False,
        type="pil",
        format="jpeg",
        buttons=[],
    )
    which = gr.Radio([], label="Photo", elem_id="which", visible=False, type="index")
    note = gr.Markdown("", elem_id="faces-note")
    shown = [faces, which, note]
    people = examples()
    if people:
        gr.Markdown("No photo at hand? Take one of these drawn people.", elem_classes="idgen-note")
        shelf = gr.Gallery(
            value=people,
            label="Example people",
            show_label=False,
            elem_id="examples",
            columns=5,
            allow_preview=False,
            interactive=False,
            object_fit="cover",
            buttons=[],
        )
    gr.Markdown(
        "Only this page sees your photos and portraits. They leave the server within two hours.",
        elem_classes="idgen-note",
    )

    def changed(session: Session, photos: list[Any] | None) -> Iterator[tuple[Any, ...]]:
        # Even when a photo is refused, the faces of the one before must not stay on show.
        if not photos:
            session.sittings = []
            yield _faces(session)
            return
        yield gr.skip(), gr.skip(), "Looking for faces …"
        try:
            with toasts():
                page.look(session, photos)
        except gr.Error:
            session.sittings = []
            yield _faces(session)
            raise
        yield _faces(session)

    def pick(session: Session, event: gr.SelectData) -> tuple[Any, ...]:
        if session.sittings:
            sitting = session.sittings[session.shown]
            if not sitting.pick_at(*event.index) and sitting.faces:
                gr.Info("There is no face at that place; click inside a frame.")
        return _faces(session)

    def show(session: Session, index: int | None) -> tuple[Any, ...]:
        session.shown = index or 0
        return _faces(session)

    page.photos.change(changed, [page.session, page.photos], shown, **QUIET)
    if people:

        def take(session: Session, event: gr.SelectData) -> list[str]:
            # A copy, because Gradio hands out no files of a package that is installed elsewhere.
            return [shutil.copy(people[event.index], session.folder)]

        # A gallery that is filled from here tells nobody that it changed.
        shelf.select(take, page.session, page.photos, **QUIET).then(
            changed, [page.session, page.photos], shown, **QUIET
        )
    faces.select(pick, page.session, shown, **QUIET)
    which.input(show, [page.session, which], shown, **QUIET)


def _faces(session: Session) -> tuple[Any, ...]:
    sittings: list[Sitting] = session.sittings
    if not sittings:
        return gr.Image(value=None, visible=False), gr.Radio(visible=False), ""
    index = min(session.shown, len(sittings) - 1)
    names = [f"Photo {i}" for i in range(1, len(sittings) + 1)]
    return (
        gr.Image(value=sittings[index].drawn(), visible=True),
        gr.Radio(choices=names, value=names[index], visible=len(sittings) > 1),
        describe(sittings),
    )
