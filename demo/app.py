"""The web demo: ``idgen demo``, a hub Space (``space.py``), or mounted into the HTTP service.

>>> build(engine)                       # gradio.Blocks
>>> mount(fastapi_app, engine)          # the same at a path of another app

Models are loaded when the first portrait is asked for, so that the page is there at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

# People upload photos of themselves here; Gradio reports usage to its makers unless told otherwise.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from idgen.demo.page import QUIET, Page, person_panel
from idgen.demo.panels import HEADER
from idgen.demo.session import Session

if TYPE_CHECKING:
    from idgen.demo.limits import Limits
    from idgen.engine import Engine
    from idgen.faces import FaceExtractor

MAX_UPLOAD = "30mb"
SWEEP = (600, 7200)
"""Every ten minutes Gradio's copies of files older than two hours are deleted (seconds). A page's own folder goes when
it is left; but of these copies pages with equal files share one."""


def build(
    engine: Engine,
    *,
    base: str | None = None,
    ready: Collection[str] | None = None,
    extractor: Callable[[], FaceExtractor] | None = None,
    limits: Limits | None = None,
) -> gr.Blocks:
    """Build the page.

    Args:
        engine: does the work. It may be shared with a service.
        base: the base model that the engine loads, which decides what pipelines can be offered; ``None``: any.
        ready: names of pipelines that the engine can run whatever the weights manifest says.
        extractor: finds the faces in the photos; the default one if ``None``.
        limits: what the server allows; ``None``: whatever the library does.
    """
    from idgen.api import default_extractor
    from idgen.demo.batch import batch_tab
    from idgen.demo.compare import compare_tab
    from idgen.demo.create import create_tab
    from idgen.demo.history import history_tab
    from idgen.demo.limits import LimitedEngine, Limits
    from idgen.demo.offers import offers
    from idgen.demo.uploads import Blocks

    limited = LimitedEngine(engine, limits or Limits())
    with Blocks(title="idgen", analytics_enabled=False, delete_cache=SWEEP, fill_width=True) as blocks:
        state = gr.State(Session(), delete_callback=Session.close)
        page = Page(limited, offers(base, ready), extractor or default_extractor, state)
        gr.HTML(HEADER, padding=False)
        with gr.Row(elem_classes="idgen-columns"):
            with gr.Column(scale=3, min_width=300, elem_id="person"):
                person_panel(page)
            with gr.Column(scale=9, min_width=320), gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as tabs:
                with gr.Tab("Create", id="create"):
                    create = create_tab(page)
                with gr.Tab("Compare", id="compare") as tab:
                    compare_tab(page, tab, create)
                with gr.Tab("Batch", id="batch"):
                    batch_tab(page)
                with gr.Tab("History", id="history") as tab:
                    history_tab(page, tab, tabs, create)
        _clean_up(blocks, state)
    blocks.queue(max_size=64, default_concurrency_limit=8)
    return blocks


def _clean_up(blocks: gr.Blocks, state: gr.State) -> None:
    """Stop the work of a page that is closed and delete its files; the page itself is not told of the others."""
    open_pages: WeakValueDictionary[str, Session] = WeakValueDictionary()

    def opened(session: Session, request: gr.Request) -> Session:
        if request.session_hash:
            open_pages[request.session_hash] = session
        return session

    def left(request: gr.Request) -> None:
        session = open_pages.pop(request.session_hash or "", None)
        if session is not None:
            session.leave()

    blocks.load(opened, state, state, **QUIET)
    blocks.unload(left)


def look() -> dict[str, Any]:
    """Options of ``launch`` and ``mount_gradio_app`` that make it look and behave as it should."""
    from idgen.demo.theme import css, theme

    # Gradio's own run history would keep a page's pictures in the browser after it is closed.
    return {"theme": theme(), "css": css(), "footer_links": ["api"], "run_history": False, "max_file_size": MAX_UPLOAD}


def mount(app: Any, engine: Engine, path: str = "/", **options: Any) -> Any:
    """Mount the demo into a FastAPI app; ``options`` as for :func:`build`. Returns the app."""
    return gr.mount_gradio_app(app, build(engine, **options), path=path, show_error=False, **look())


def launch(
    engine: Engine,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    open_browser: bool = False,
    wait: bool = True,
    **options: Any,
) -> str:
    """Serve the demo; ``options`` as for :func:`build`. Returns its address, at once with ``wait=False``."""
    blocks = build(engine, **options)
    _, local, public = blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        show_error=False,
        quiet=True,
        ssr_mode=False,
        **look(),
    )
    address = public or local
    print(f"idgen demo is ready at {address}", flush=True)
    if wait:
        blocks.block_thread()
    return address


def main() -> None:
    """Run with settings from the environment, as a hub Space does: ``IDGEN_DEMO_BASE`` names the base."""
    from idgen.engine import Engine

    base = os.environ.get("IDGEN_DEMO_BASE") or None
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    with Engine({"base": base} if base else None) as engine:
        launch(engine, host=host, port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")), base=base)


if __name__ == "__main__":
    main()
