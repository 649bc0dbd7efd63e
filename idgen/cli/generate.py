"""`idgen generate`: portraits from a photo and a prompt."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from idgen.errors import BadImage, BadRequest

if TYPE_CHECKING:
    from idgen.pipeline import Pipeline
    from idgen.portrait import Portrait
    from idgen.sampler import Step
    from idgen.speed import Levers
    from idgen.user_weights import UserWeights


def generate(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Photos of one person, or an identity (.safetensors); last the prompt.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write; with -n above 1, numbered.")] = Path(
        "portrait.png"
    ),
    pipeline: Annotated[str, typer.Option(help="See 'idgen pipelines'; join two with +.")] = "auto",
    base: Annotated[
        str | None, typer.Option(help="sdxl, sd15, mini, a folder, a hub id or a .safetensors file.")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="How many.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; up to 1 is off.")] = None,
    identity_scale: Annotated[float | None, typer.Option(help="Weight of the identity, 0 to 3.")] = None,
    structure_scale: Annotated[float | None, typer.Option(help="Weight of the face structure, 0 to 3.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="euler, dpm++-2m-karras, ddim, unipc, lcm ...")] = None,
    pose: Annotated[Path | None, typer.Option(help="InstantID: a photo whose face gives place and pose.")] = None,
    image: Annotated[Path | None, typer.Option(help="Start from this picture.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White where the picture may change.")] = None,
    strength: Annotated[float | None, typer.Option(help="How far to leave the start picture, 0 to 1.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="LoRA file or hub id; FILE:0.8 sets its weight.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter file, in place of the store's.")] = None,
    controlnet: Annotated[Path | None, typer.Option(help="ControlNet folder, in place of the store's.")] = None,
    image_encoder: Annotated[Path | None, typer.Option(help="Image encoder folder.")] = None,
    faces: Annotated[Path | None, typer.Option(help="Face pack folder.")] = None,
    recogniser: Annotated[Path | None, typer.Option(help="Recogniser .onnx file.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16")] = "auto",
    attention: Annotated[str, typer.Option(help="auto, sdpa, flash, cudnn, efficient, xformers")] = "auto",
    speed: Annotated[
        str | None, typer.Option(help="exact (the default), fast or turbo; see docs/performance.md.")
    ] = None,
    few_step: Annotated[str | None, typer.Option(help="A few-step LoRA: lcm, lightning-4, hyper-sd-8 or dmd2.")] = None,
    offload: Annotated[str | None, typer.Option(help="For small GPUs: model or sequential.")] = None,
    vae_tiling: Annotated[bool, typer.Option(help="Decode tile by tile.")] = False,
    like: Annotated[Path | None, typer.Option(help="Render again what this portrait (PNG by idgen) records.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make portraits of one person.

    idgen generate ada.jpg "oil painting of an astronaut" -n 4 --seed 7
    """
    from idgen.speed import choose_levers, preset

    fields: dict[str, Any] = {
        "n": n,
        "seed": seed,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance": guidance,
        "identity_scale": identity_scale,
        "structure_scale": structure_scale,
        "scheduler": scheduler,
        "pose": pose,
        "image": image,
        "mask": mask,
        "strength": strength,
    }
    settings: dict[str, Any] = {
        "base": base,
        "adapter": adapter,
        "controlnet": controlnet,
        "image_encoder": image_encoder,
        "faces": faces,
        "recogniser": recogniser,
        "device": device,
        "dtype": dtype,
        "attention": attention,
        "speed": choose_levers(preset(speed or "exact"), few_step),
        "offload": offload,
        "vae_tiling": vae_tiling,
    }
    data: dict[str, Any] = {}
    own: list[UserWeights] = []
    if like is not None:
        data = _recorded(like, levers=speed is None)
        if speed is None:
            settings["speed"] = choose_levers(_recorded_levers(data, like), few_step)
        pipeline, fields, settings, who, prompt = _from_portrait(data, pipeline, fields, settings, inputs or [])
        own = _recorded_user_weights(data, like, bool(lora))
    else:
        who, prompt = _split(inputs or [])
    _check_target(out, inputs or [])

    from idgen.api import load
    from idgen.request import Request

    # Everything that can be refused without loading a model is refused first.
    Request.create(prompt=prompt, **{key: value for key, value in fields.items() if value is not None})
    loaded = load(pipeline, **settings)
    if like is not None:
        _warn_of_other_weights(loaded, data, like)
    else:
        _warn_of_idle_options(loaded, prompt, fields)
    for weights in own:
        weights.load(loaded.backbone)
    for item in lora or []:
        source, scale = _lora(item)
        loaded.backbone.load_lora(source, scale)
    with Progress(quiet=as_json) as progress:
        portraits = loaded.generate(
            who, prompt, callback=progress, **{k: v for k, v in fields.items() if v is not None}
        )
    files = _save(portraits, out)
    _report(portraits, files, loaded.name, as_json)


class Progress:
    """A progress bar over the denoising steps, on a terminal only."""

    def __init__(self, quiet: bool) -> None:
        self.bar: Any = None
        self.task: Any = None
        self.quiet = quiet or not sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __call__(self, step: Step) -> None:
        if self.quiet:
            return
        if self.bar is None:
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("denoising", total=step.total)
        self.bar.update(self.task, completed=step.index + 1)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def _split(inputs: list[str]) -> tuple[Any, str | None]:
    """Photos or an identity, then the prompt: the last word that is no file."""
    # os.path, not pathlib: a long prompt is no valid file name, which pathlib would raise about.
    prompt = inputs[-1] if inputs and not os.path.isfile(inputs[-1]) else None  # noqa: PTH113
    files = inputs[:-1] if prompt is not None else inputs
    if prompt is not None and Path(prompt).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".safetensors"):
        raise BadRequest(f"there is no file {prompt}.", "who")
    if prompt is not None and os.path.isdir(prompt):  # noqa: PTH112
        raise BadRequest(f"{prompt} is a folder; give photos, and the prompt last, in quotes.", "who")
    if not files:
        return None, prompt
    if any(file.endswith(".safetensors") for file in files):
        if len(files) > 1:
            raise BadRequest("give one identity file, or photos.", "who")
        from idgen.identity import Identity

        return Identity.load(files[0]), prompt
    for file in files:
        if not os.path.exists(file):  # noqa: PTH110
            raise BadRequest(f"there is no file {file}; the prompt comes last, in quotes.", "who")
    return list(files), prompt


def _from_portrait(
    data: dict[str, Any], pipeline: str, fields: dict[str, Any], settings: dict[str, Any], inputs: list[str]
) -> tuple[str, dict[str, Any], dict[str, Any], Any, str | None]:
    """Fields and inputs as a portrait's record has them; what is given beside it on the command line wins."""
    from idgen.memory import recall

    recorded = dict(data["request"])
    if settings["speed"].few_step != data.get("levers", {}).get("few_step"):
        # They are a few-step LoRA's own, or those of a picture without it: neither suits the other.
        recorded = {name: value for name, value in recorded.items() if name not in ("steps", "guidance", "scheduler")}
    given = {name: value for name, value in fields.items() if value is not None and name != "n"}
    who, prompt = _split(inputs)
    own_prompt, own_pipeline = recorded.pop("prompt", None), recorded.pop("pipeline", "auto")
    prompt = own_prompt if prompt is None else prompt
    pipeline = own_pipeline if pipeline == "auto" else pipeline
    kept = {name: recall(value) for name, value in data["inputs"].items() if name != "who" and name not in given}
    if who is None:
        names = data["inputs"].get("who")
        who = [recall(name) for name in names] if isinstance(names, list) else names and recall(names)
    merged = {**recorded, "seed": data["seed"], "n": fields["n"], **kept, **given}
    settings = {**settings, **data["options"], "base": settings["base"] or data["base"]}
    if settings["dtype"] == "auto":
        settings["dtype"] = data["dtype"]
    return pipeline, merged, settings, who, prompt


_RECORDED = {
    **{"request": dict, "inputs": dict, "options": dict, "levers": dict, "weights": dict},
    **{"base": str, "dtype": str, "seed": int},
}
"""What rendering again needs; see :func:`idgen.provenance.provenance`."""


def _recorded(like: Path, levers: bool) -> dict[str, Any]:
    """A portrait's metadata. levers: whether it must say at which speed it was made, as early versions' do not."""
    from idgen.portrait import read_metadata

    data = read_metadata(like)
    if levers and "levers" not in data:
        raise BadImage(f"{like} does not say at which speed it was made: it is of an earlier version. Give --speed.")
    for name, kind in _RECORDED.items():
        if not isinstance(data.get(name, {} if name == "levers" else None), kind):
            raise BadImage(f"{like} carries idgen metadata that is not whole: {name!r} is missing or damaged.")
    return data


def _recorded_levers(data: dict[str, Any], like: Path) -> Levers:
    from idgen.speed import Levers

    try:
        return Levers(**data["levers"])
    except TypeError as error:
        raise BadImage(f"{like} was made by another version of idgen: {error}. Give --speed.") from None


def _recorded_user_weights(data: dict[str, Any], like: Path, other_loras: bool) -> list[UserWeights]:
    """The LoRAs and embeddings that a portrait was made with, all of them there; other LoRAs replace its own."""
    from idgen.user_weights import recorded

    own = recorded(data, like.name)
    if other_loras:
        own = [weights for weights in own if weights.kind != "lora"]
    for weights in own:
        weights.check(like.name)
    return own


def _warn_of_other_weights(loaded: Pipeline, data: dict[str, Any], like: Path) -> None:
    from idgen.provenance import weight_hashes

    now, then = weight_hashes(loaded), data["weights"]
    for role in sorted(set(now) | set(then)):
        if now.get(role) != then.get(role):
            logging.getLogger("idgen").warning("the weights of %s are not those that made %s.", role, like.name)


def _warn_of_idle_options(loaded: Pipeline, prompt: str | None, fields: dict[str, Any]) -> None:
    """What is asked for and changes nothing is said, not left to be found out."""
    idle = []
    if prompt and any(method.speaks_text for method in loaded.methods):
        idle.append("the prompt")
    if fields["pose"] is not None and not any(hasattr(method, "controlnet") for method in loaded.methods):
        idle.append("--pose")
    if fields["strength"] is not None and fields["image"] is None:
        idle.append("--strength without --image")
    if idle:
        logging.getLogger("idgen").warning("%s: %s will change nothing.", loaded.name, " and ".join(idle))


def _lora(item: str) -> tuple[str, float]:
    source, _, scale = item.rpartition(":")
    try:
        return (source, float(scale)) if source else (item, 1.0)
    except ValueError:
        return item, 1.0


def _check_target(out: Path, inputs: list[str]) -> None:
    """Find out before the rendering, not after it, that the picture could not be saved."""
    from idgen.portrait import FORMATS

    if out.suffix.lower() not in FORMATS:
        raise BadRequest(f"--out {out}: the name must end in {', '.join(FORMATS)}.", "out")
    if not out.parent.is_dir():
        raise BadRequest(f"--out {out}: there is no folder {out.parent}.", "out")
    if out.is_dir():
        raise BadRequest(f"--out {out} is a folder; name a picture in it.", "out")
    if out.is_file() and any(os.path.isfile(given) and out.samefile(given) for given in inputs):  # noqa: PTH113
        raise BadRequest(f"--out {out} is the photo itself, which would be lost; choose another name.", "out")
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise BadRequest(f"--out {out}: cannot write to {out.parent} ({error.strerror or error}).", "out") from None


def _save(portraits: list[Portrait], out: Path) -> list[Path]:
    if len(portraits) == 1:
        return [portraits[0].save(out)]
    return [p.save(out.with_name(f"{out.stem}-{i}{out.suffix}")) for i, p in enumerate(portraits, 1)]


def _report(portraits: list[Portrait], files: list[Path], pipeline: str, as_json: bool) -> None:
    if as_json:
        rows = [{"file": str(f), **p.metadata(), "likeness_note": p.likeness_note} for p, f in zip(portraits, files)]
        typer.echo(json.dumps(rows, indent=2))
        return
    for portrait, file in zip(portraits, files):
        likeness = portrait.likeness_note if portrait.likeness is None else f"{portrait.likeness:.2f}"
        typer.echo(f"{file}: {pipeline}, seed {portrait.seed}, likeness {likeness}")
