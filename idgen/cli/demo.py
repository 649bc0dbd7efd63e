"""`idgen demo`: open the web demo."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any

import typer

from idgen.errors import BadRequest


def demo(
    base: Annotated[
        str | None,
        typer.Option(help="Base model: sdxl, sd15, mini, a diffusers folder or a hub id. Default: any."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 lets in all who can reach it.")
    ] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="Also open a public link through Gradio's servers.")] = False,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16 or bfloat16.")] = None,
    speed: Annotated[str | None, typer.Option(help="exact, fast or turbo; see docs/performance.md.")] = None,
    few_step: Annotated[str | None, typer.Option(help="A few-step LoRA: lcm, lightning-4, hyper-sd-8 or dmd2.")] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait before new ones are refused.")] = 32,
) -> None:
    """Open the web demo. The page is there at once; models are loaded when the first portrait is asked for."""
    if importlib.util.find_spec("gradio") is None:
        raise BadRequest(
            "the demo needs Gradio, which is not installed. Get it with: pip install 'idgen[demo]'", "demo"
        )
    from idgen.demo.app import launch
    from idgen.engine import Engine
    from idgen.speed import choose_levers, preset

    levers = choose_levers(preset(speed or "exact"), few_step)
    settings: dict[str, Any] = {"base": base, "device": device, "dtype": dtype, "speed": levers}
    with Engine({name: value for name, value in settings.items() if value is not None}, queue_size=queue) as engine:
        try:
            launch(engine, base=base, host=host, port=port, share=share, open_browser=open_browser)
        except OSError:  # Gradio's own words speak of its parameters
            message = f"cannot listen on {host}:{port}: it is taken, or not this machine's. Choose another with --port."
            raise BadRequest(message, "port") from None
