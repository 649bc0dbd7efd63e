"""The stages of making mini, in order: each reads what earlier ones left in the run folder and can be run again
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from idgen.errors import BadRequest

from . import generator_stages as late
from . import preparing_stages as early
from .run import Run
from .workers import launch


@dataclass(frozen=True)
class Stage:
    """A stage, the file that says it is done, its share of a whole run's time, the stages that it reads the results of
    and whether CPU workers share it."""

    work: Callable[[Run], None]
    result: str
    share: float
    needs: tuple[str, ...] = ()
    shared: bool = False


STAGES: dict[str, Stage] = {
    "data": Stage(early.render_data, "shards", 0.09, shared=True),
    "text": Stage(early.train_text, "text_final.pt", 0.02),
    "faces": Stage(early.faces, "attributes.safetensors", 0.18, ("data",)),
    "autoencoder": Stage(early.train_autoencoder, "autoencoder.done.json", 0.14, ("data",), shared=True),
    "latents": Stage(early.encode, "latents", 0.02, ("faces", "autoencoder"), shared=True),
    "projector": Stage(early.train_projector, "projector_final.pt", 0.01, ("latents",)),
    "reader": Stage(early.train_reader, "reader_final.pt", 0.03, ("latents",)),
    "expression": Stage(early.train_expression, "expression_final.pt", 0.02, ("data",)),
    "generator": Stage(
        late.train_generator,
        "generator.done",
        0.30,
        ("text", "projector", "reader", "expression", "faces"),
        shared=True,
    ),
    "decoder": Stage(early.finish_decoder, "decoder.done.json", 0.04, ("faces", "autoencoder")),
    "face-image": Stage(late.train_face_image, "face_image.done", 0.03, ("generator",)),
    "instantid": Stage(late.train_instantid, "identity_net.done", 0.06, ("generator",), shared=True),
    "arc2face": Stage(late.train_arc2face, "arc2face.done", 0.06, ("generator",), shared=True),
}
"""In order. `latents` and `data` complete what is missing, so they always run."""


def run_stage(name: str, run: Run, again: list[str]) -> None:
    """Run one stage here, or as several workers when it can be shared; ``again`` are the arguments to repeat for them.

    The marker file is written only when the budget is used up, so an interrupted stage goes on where it stopped.

    Raises:
        BadRequest: a stage that it needs is not done; names it.
    """
    stage = STAGES[name]
    marker = run.root / stage.result
    always = name in ("data", "latents")
    if marker.exists() and not always:
        print(f"{name}: done already ({marker})")
        return
    check_done(name, stage.needs, run)
    run.root.mkdir(parents=True, exist_ok=True)
    if stage.shared and run.kind == "cpu" and run.workers > 1 and run.group.count == 1:
        launch(again, run.workers)
        return
    stage.work(run)
    if run.group.first and stage.result.endswith(".done"):
        marker.touch()


def check_done(name: str, needs: Iterable[str], run: Run) -> None:
    """Raises BadRequest when a stage that ``name`` needs is not done in the run folder; names it and the cure."""
    missing = [other for other in needs if not run.has(STAGES[other].result)]
    if missing:
        said = f"{name} needs {', '.join(missing)}, not done in {run.root} yet: run"
        raise BadRequest(f"{said} {'it' if len(missing) == 1 else 'them'} first, or all.", "stage")


def all_stages(run: Run, total: float, command: Callable[[str, float], list[str]]) -> None:
    """Every stage with its share of ``total`` minutes; ``command`` gives the arguments that run one stage."""
    early.sheet(run)
    for name, stage in STAGES.items():
        run.minutes = stage.share * total
        run_stage(name, run, command(name, run.minutes))


__all__ = ["STAGES", "Stage", "all_stages", "check_done", "run_stage"]
