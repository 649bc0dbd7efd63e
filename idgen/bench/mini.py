"""The mini suite: what a user of the bundled models waits for, and what each approximate lever does to the likeness.

Random weights say how long a step takes; only trained ones say what a lever costs in the picture. Portraits go through
the public API. People are of mini's validation split, rendered here; the judge is mini's scorer, which shares nothing
with the recogniser that conditions the generator. Processor time of one thread, except for new processes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from idgen.bench.cpu import APPROXIMATE
from idgen.bench.face_rows import face_rows
from idgen.bench.first import first_picture_of
from idgen.bench.machine import describe, has_fast_bfloat16
from idgen.bench.stages import stages
from idgen.bench.timing import Clock, Summary, paired, relative_error
from idgen.faces import FaceExtractor
from idgen.locate import locate
from idgen.request import Request
from idgen.speed import PRESETS, Levers

PIPELINES = ("ip-adapter-faceid-plusv2", "instantid", "arc2face")
JUDGED = ("ip-adapter-faceid-plusv2", "instantid")
"""Pipelines whose levers are judged; arc2face has no prompt and no IdentityNet, so it adds nothing."""
PROMPTS = (
    "a photo of a person, smiling, facing the camera, wearing a red shirt, soft light, blue background",
    "a photo of a person, with a neutral face, looking left, wearing a green shirt, soft light, yellow background",
)
BATCH = 12


def suite(
    steps: int = 20,
    rounds: int = 5,
    people: int = 12,
    pipelines: tuple[str, ...] = PIPELINES,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure and return what :mod:`idgen.bench.report` shows and saves.

    Args:
        rounds: of the comparisons; latency is taken of twice as many portraits.
        people: whose likeness is measured, each with both prompts.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def part(title: str, more: Iterator[dict[str, Any]]) -> None:
        say(title)
        rows.extend({"part": title, **row} for row in more)

    try:
        machine = describe()
        photos = meet(people)
        part("a new process, wall-clock time", _new_processes(pipelines, steps))
        part("one portrait of a person not seen before, warm", _latency(pipelines, photos, steps, 2 * rounds))
        part("stages of one portrait", _stages(pipelines, photos, steps))
        part("levers: gain, latent error, likeness", _levers(pipelines, photos, steps, rounds))
        part("faces, wall-clock time", face_rows(rounds=min(3, rounds)))
    finally:
        torch.set_num_threads(threads)
    return {"suite": "mini", "machine": machine, "clock": Clock("cpu").unit, "steps": steps, "rows": rows}


def meet(count: int) -> list[Image.Image]:
    """Front photos of the first validation people, 128 pixels, without hat and glasses."""
    from idgen.training.data import SPLIT_SEEDS
    from idgen.training.heads import render, sample_nuisances, sample_people
    from idgen.training.sheets import to_pil

    seed = SPLIT_SEEDS["validation"]
    people = sample_people(100, seed)[:count]
    plain = sample_nuisances(
        count, seed, style="photo", pose="front", expression="neutral", light="soft", glasses="no", hat="no"
    )
    return [to_pil(image) for image in render(people, plain).images]


def _new_processes(pipelines: tuple[str, ...], steps: int) -> Iterator[dict[str, Any]]:
    for name in pipelines:
        yield {"kind": name, **{f"{k}, s": v for k, v in first_picture_of(name, steps=steps, threads=1).items()}}


def _load(name: str, dtype: str = "float32") -> Any:
    """With a face cache of one photo, so that each new photo is looked at."""
    import idgen
    from idgen.api import extractor_for
    from idgen.registry import method

    pipe = idgen.load(name, base="mini", device="cpu", dtype=dtype)
    shared = extractor_for(method(name), pipe.backbone)
    pipe.extractor = FaceExtractor(shared.pack, shared.recogniser, device="cpu", cache_size=1)
    return pipe


def _latency(pipelines: tuple[str, ...], photos: list[Image.Image], steps: int, count: int) -> Iterator[dict[str, Any]]:
    clock = Clock("cpu")
    for name in pipelines:
        pipe = _load(name)
        make = partial(pipe.generate, prompt=None if name == "arc2face" else PROMPTS[0], steps=steps)
        make(photos[-1], seed=0)
        # A pixel more or less makes another photo of the same person, which no cache knows.
        cut = [photos[i % len(photos)].crop((0, 0, 128 - i // len(photos), 128)) for i in range(count)]
        times = Summary.of([clock.measure(partial(make, photo, seed=i)) for i, photo in enumerate(cut)])
        yield {
            "kind": name,
            "p50_s": times.median / 1000,
            "p95_s": times.p95 / 1000,
            "portraits": times.count,
            "portraits_s": 1000 / times.median,
        }


def _stages(pipelines: tuple[str, ...], photos: list[Image.Image], steps: int) -> Iterator[dict[str, Any]]:
    for name in pipelines:
        pipe = _load(name)
        split = [stages(pipe, photo, None if name == "arc2face" else PROMPTS[0], steps) for photo in photos[:3]]
        middle = {stage: statistics.median(each[stage] for each in split) for stage in split[0]}
        yield {"kind": name, **{f"{stage}, ms": round(value, 1) for stage, value in middle.items()}}


def _levers(pipelines: tuple[str, ...], photos: list[Image.Image], steps: int, rounds: int) -> Iterator[dict[str, Any]]:
    judge = Judge(photos)
    for name in (name for name in JUDGED if name in pipelines):
        pipe = _load(name)
        chosen = {n: v for n, v in APPROXIMATE.items() if name == "instantid" or "IdentityNet" not in n}
        variants = {n: (pipe, levers) for n, levers in chosen.items()}
        if has_fast_bfloat16():
            half = _load(name, "bfloat16")
            presets = ("exact", "fast", "turbo")
            variants |= {f"bfloat16, {preset}": (half, PRESETS[preset]) for preset in presets}
        identity = pipe.order(Request.create(who=photos[0], pipeline=name)).identity
        one = {"prompt": PROMPTS[0], "seed": 0, "steps": steps}
        runs = {n: partial(p.generate, identity, speed=levers, **one) for n, (p, levers) in variants.items()}
        times = paired(partial(pipe.generate, identity, **one), runs, rounds=rounds)
        reference, scores = judge.portraits(pipe, Levers(), steps)
        yield {"kind": name, "variant": "exact", "p50_s": times.times["baseline"].median / 1000, **_likeness(scores)}
        for variant, (which, levers) in variants.items():
            latents, got = judge.portraits(which, levers, steps)
            change = got - scores
            yield {
                "kind": name,
                "variant": variant,
                "p50_s": times.times[variant].median / 1000,
                **_likeness(got),
                "likeness_change": round(float(change.mean()), 4),
                "standard_error": round(float(change.std(ddof=1) / len(change) ** 0.5), 4),
                "relative_l2_error": relative_error(latents, reference)[1],
                "ratio": times.ratios[variant].as_dict(),
            }


def _likeness(scores: np.ndarray) -> dict[str, Any]:
    """A portrait without a face counts as 0."""
    return {
        "likeness": round(float(scores.mean()), 4),
        "portraits": len(scores),
        "faces_found": round(float((scores != 0).mean()), 3),
    }


class Judge:
    """The cosine between each person's photo and portrait, by the scorer."""

    def __init__(self, photos: list[Image.Image]) -> None:
        self.photos = photos
        self.scorer = FaceExtractor(locate("mini-faces"), locate("mini-scorer"), device="cpu")
        self.references = [face.normed for face in self.scorer.face_of_each(photos)]

    def portraits(self, pipe: Any, levers: Levers, steps: int) -> tuple[torch.Tensor, np.ndarray]:
        """Everybody with every prompt, the seeds always the same.

        Returns:
            The final latents (n, c, h, w) and the scores [n].
        """
        cast = [(person, prompt) for prompt in PROMPTS for person in range(len(self.photos))]
        latents, scores = [], []
        for begin in range(0, len(cast), BATCH):
            some = cast[begin : begin + BATCH]
            orders = [
                Request.create(who=self.photos[person], prompt=prompt, seed=begin + i, steps=steps, pipeline=pipe.name)
                for i, (person, prompt) in enumerate(some)
            ]
            latents.append(pipe.generate_many(orders, output="latent", speed=levers))
            pixels = (pipe.backbone.decode(latents[-1]) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            found = self.scorer.extract_many([Image.fromarray(each) for each in pixels])
            for (person, _), faces in zip(some, found):
                seen = isinstance(faces, list)
                scores.append(float(faces[0].normed @ self.references[person]) if seen else 0.0)  # type: ignore[index]
        return torch.cat(latents), np.array(scores)
