"""`idgen serve`: the HTTP service, with the web demo."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from idgen.errors import BadRequest

if TYPE_CHECKING:
    from idgen.service.settings import ServiceSettings


def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one. [default: 8000]")] = None,
    pipeline: Annotated[
        list[str] | None, typer.Option(help="Pipeline to serve; again for more. The first is loaded at start.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="sdxl, sd15, mini, a folder, a hub id or a file.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N, mps")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16, bfloat16")] = None,
    offload: Annotated[str | None, typer.Option(help="For small GPUs: model or sequential.")] = None,
    speed: Annotated[str | None, typer.Option(help="exact, fast or turbo; see docs/performance.md.")] = None,
    few_step: Annotated[str | None, typer.Option(help="A few-step LoRA: lcm, lightning-4, hyper-sd-8 or dmd2.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with an API key on each line. Needed for a public address.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="An API key; again for more. Others on this machine can see it: better a file."),
    ] = None,
    rate_limit: Annotated[
        float | None, typer.Option(help="Requests a minute for each key; 0: any. [default: 0]")
    ] = None,
    queue_size: Annotated[int | None, typer.Option(help="Requests that may wait. [default: 64]")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Images in one UNet call. [default: 8]")] = None,
    batching: Annotated[
        bool | None, typer.Option("--batching/--no-batching", help="Share UNet calls between requests.")
    ] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds a request may take. [default: 600]")] = None,
    fetch_host: Annotated[
        list[str] | None, typer.Option(help="Host from which photos may be fetched by URL; again for more.")
    ] = None,
    demo: Annotated[bool | None, typer.Option("--demo/--no-demo", help="The web demo at /.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with these and all other settings, see docs/service.md.")
    ] = None,
) -> None:
    """Serve portraits over HTTP: the OpenAI Images API, an API of our own, and the web demo.

    Every setting is also an environment variable, as IDGEN_SERVE_PORT. Flags win over these, and these over the file.
    """
    try:
        from idgen.service.settings import ServiceSettings
    except ImportError as error:
        raise BadRequest(f'the service needs more packages ({error.name}): pip install "idgen[serve]"') from None
    settings = ServiceSettings.read(
        config,
        host=host,
        port=port,
        pipelines=pipeline,
        base=base,
        device=device,
        dtype=dtype,
        offload=offload,
        speed=speed,
        few_step=few_step,
        api_key_file=api_key_file,
        api_keys=api_key,
        rate_limit=rate_limit,
        queue_size=queue_size,
        max_batch=max_batch,
        batching=batching,
        deadline_s=deadline,
        fetch_hosts=fetch_host,
        demo=demo,
    )
    check_pipelines(settings)
    run(settings)


def check_pipelines(settings: ServiceSettings) -> None:
    """Refuse to start for pipelines that nobody could use.

    Raises:
        BadRequest, WeightsMissing: a name is wrong, or its weights are not here.
    """
    from idgen.bases import BASES
    from idgen.errors import WeightsMissing
    from idgen.registry import methods_of, pipelines

    infos = {info.name: info for info in pipelines()}
    for name in [cls.name for given in settings.pipelines if given != "auto" for cls in methods_of(given)]:
        own_base = settings.base is not None and settings.base not in ("mini", *BASES)
        if not own_base and not infos[name].available:
            lacking = sorted({entry for entries in infos[name].missing.values() for entry in entries})
            raise WeightsMissing(f"{name} lacks weights. Get them with: idgen weights pull {' '.join(lacking)}")
    if not settings.pipelines and not any(info.available for info in infos.values()):
        raise WeightsMissing("no pipeline has all its weights here. See: idgen weights list")


def run(settings: ServiceSettings, **options: Any) -> None:
    """Serve until told to stop; running requests get ``grace_s`` seconds to finish. ``options`` go to uvicorn."""
    from idgen.service import server
    from idgen.service.app import create_app

    logging.getLogger("idgen").setLevel(logging.INFO)
    server.run(create_app(settings), **options)
