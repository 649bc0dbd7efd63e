"""How good mini is, on people it has never seen: likeness, prompts, pose, autoencoder, speed.

    python benchmarks/mini_quality.py                      # all of it, about 20 minutes on 4 cores
    python benchmarks/mini_quality.py --people 20 --only likeness

Every portrait goes through idgen's public API. Every face is found by mini's detector in the picture itself, and judged
by the scorer, which shares nothing with the recogniser that conditions the generator. A portrait in which no face is
found counts as unlike (cosine 0, rank wrong). Beside each number stands what real renders reach in the same places: new
renders of the same people under the same prompts. Writes JSON, a table and pictures to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mini_report import write_report
from PIL import Image

import idgen
from idgen.errors import NoFaceFound
from idgen.faces import FaceExtractor
from idgen.locate import locate
from idgen.request import Request
from idgen.training.attributes import load_reader, visible
from idgen.training.data import PER_PERSON, RenderSet, read_shard, render_shard, shard_path, write_shard
from idgen.training.expression import load_judge
from idgen.training.facedata import align
from idgen.training.heads import ATTRIBUTES, caption, describe, landmarks, render, sample_nuisances
from idgen.training.sheets import save_sheet, to_pil

HERE = Path(__file__).parent
READER = HERE / "mini_attributes.safetensors"
EXPRESSIONS = HERE / "mini_expression.safetensors"
SHARDS = HERE.parent / "runs" / "mini" / "shards"
"""Where the test people's renders are kept between runs: drawing them takes minutes on a CPU."""
PIPELINES = ("ip-adapter-faceid-plusv2", "instantid", "arc2face")
STEPS = 20
BATCH = 10
SCENES: tuple[dict[str, Any], ...] = (
    {"expression": "smiling", "pose": "right", "shirt": "red", "background": "blue"},
    {"expression": "laughing", "pose": "left", "shirt": "green", "background": "yellow"},
    {"expression": "neutral", "pose": "front", "shirt": "white", "background": "purple", "glasses": "yes"},
    {
        "expression": "surprised",
        "pose": "front",
        "shirt": "blue",
        "background": "gray",
        "hat": "yes",
        "hat_colour": "red",
    },
)
"""The four prompts of the likeness table; what they leave open is "soft light", no glasses, no hat, a photo."""
SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3)


@dataclass
class People:
    """The test people: their renders, their reference photo (front, no hat, no glasses), the references' embeddings."""

    renders: RenderSet
    photos: list[Image.Image]
    references: np.ndarray
    """[n, 512], unit length, by the scorer."""

    def __len__(self) -> int:
        return len(self.photos)


class Judge:
    """Finds the face in a picture as idgen does in photos, embeds it with the scorer, reads its expression."""

    def __init__(self) -> None:
        self.extractor = FaceExtractor(locate("mini-faces"), locate("mini-scorer"), device="cpu")
        self.expressions = load_judge(EXPRESSIONS)

    def look(self, image: Image.Image) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Unit embedding [512] and keypoints [5, 2] of the largest face, or two ``None``."""
        try:
            face = self.extractor.face(image)
        except NoFaceFound:
            return None, None
        return face.normed, face.keypoints

    def expression(self, images: torch.Tensor) -> torch.Tensor:
        """Class of the expression in each picture [n, 3, 128, 128] in 0..1, -1 where no face is found: [n]."""
        found = torch.full((len(images),), -1)
        for i, image in enumerate(images):
            keypoints = self.look(to_pil(image))[1]
            if keypoints is not None:
                crop = align(image[None] * 255, torch.from_numpy(keypoints)[None].float())
                found[i] = self.expressions(crop).argmax()
        return found

    def likeness(self, images: Sequence[Image.Image], who: Sequence[int], people: People) -> dict[str, float]:
        """Cosine to the own and to the other people's references, rank-1, and how many faces were found at all."""
        own, others, right, found = [], [], 0, 0
        for image, person in zip(images, who):
            embedding, _ = self.look(image)
            if embedding is None:
                own.append(0.0)
                continue
            found += 1
            cosine = people.references @ embedding
            own.append(float(cosine[person]))
            others.append(float(np.delete(cosine, person).mean()))
            right += int(cosine.argmax() == person)
        return {
            "own": float(np.mean(own)),
            "others": float(np.mean(others)) if others else 0.0,
            "rank1": right / len(images),
            "found": found / len(images),
        }


def meet(n: int, judge: Judge) -> People:
    """The first ``n`` test people."""
    path = shard_path(SHARDS, "test", 0)
    if not path.exists():
        write_shard(render_shard("test", 0), path)
    renders = read_shard(path)
    photos = [to_pil(renders.images[PER_PERSON * i].float() / 255) for i in range(n)]
    looks = [judge.look(photo)[0] for photo in photos]
    missing = [i for i, e in enumerate(looks) if e is None]
    if missing:
        raise SystemExit(f"no face found in the reference photos {missing}: the detector is broken")
    return People(renders, photos, np.stack([e for e in looks if e is not None]))


def generate(pipeline: str, orders: Sequence[dict[str, Any]]) -> list[Image.Image]:
    """One portrait for each order, a dict of request fields. The only place that generates."""
    pipe = idgen.load(pipeline, base="mini", device="cpu")
    images = []
    for i in range(0, len(orders), BATCH):
        requests = [Request.create(pipeline=pipeline, **order) for order in orders[i : i + BATCH]]
        images += [made[0].image for made in pipe.generate_many(requests)]
        print(f"  {pipeline}: {len(images)} of {len(orders)}", flush=True)
    return images


def twins(people: People, who: Sequence[int], labels: Any) -> torch.Tensor:
    """Test people rendered anew in given circumstances: what a perfect generator would make. [n, 3, 128, 128]"""
    rows = people.renders.people[list(who)]
    return torch.cat([render(rows[i : i + 20], labels[slice(i, i + 20)]).images for i in range(0, len(rows), 20)])


def places(people: People, who: Sequence[int], labels: Any) -> np.ndarray:
    """Where the keypoints of test people lie in given circumstances, [n, 5, 2] pixels of 128, without drawing them."""
    return landmarks(describe(people.renders.people[list(who)]), labels.values, 128)[0].numpy()


def casting(people: People, portraits: int) -> tuple[list[int], Any]:
    """Who is shown in which scene: everybody once, then everybody in the next scene, and so on."""
    n = len(people)
    who = [i % n for i in range(portraits)]
    scenes = [SCENES[(i // n + i % n) % len(SCENES)] for i in range(portraits)]
    plain = {"light": "soft", "glasses": "no", "hat": "no", "hat_colour": "red", "style": "photo"}
    labels = {}
    for name, classes in ATTRIBUTES.items():
        labels[name] = torch.tensor([classes.index({**plain, **scene}[name]) for scene in scenes])
    return who, sample_nuisances(portraits, 700, **labels)


def measure_real(people: People, judge: Judge, out: Path, portraits: int) -> dict[str, float]:
    """What new renders of the same people in the same scenes reach."""
    who, labels = casting(people, portraits)
    return judge.likeness([to_pil(x) for x in twins(people, who, labels)], who, people)


def measure_likeness(pipeline: str, people: People, judge: Judge, out: Path, portraits: int) -> dict[str, float]:
    """Likeness of one pipeline, and a sheet: reference and portrait, twelve pairs."""
    who, labels = casting(people, portraits)
    # Someone else's keypoints for the pose that the prompt names: the own ones would tell who it is.
    poses = places(people, [(i + 1) % len(people) for i in who], labels)
    orders = []
    for i, person in enumerate(who):
        order: dict[str, Any] = {"who": people.photos[person], "seed": i, "steps": STEPS}
        if pipeline != "arc2face":
            order["prompt"] = caption(labels.labels, i)
        if pipeline == "instantid":
            order["pose"] = poses[i]
        orders.append(order)
    images = generate(pipeline, orders)
    pairs = [x for i in range(min(12, portraits)) for x in (people.photos[who[i]], images[i])]
    save_sheet(torch.stack([_pixels(x) for x in pairs]), 8, out / f"mini_{pipeline}.png")
    return judge.likeness(images, who, people)


def measure_prompts(people: People, judge: Judge, out: Path, portraits: int) -> dict[str, Any]:
    """Share of attributes that the readers find as the prompt ordered; beside it, on real renders, the readers' own."""
    reader = load_reader(READER)
    result: dict[str, Any] = {"portraits": portraits}
    for name, shares, count in (
        ("photo", (1.0, 0, 0, 0, 0), portraits * 3 // 4),
        ("styles", (0, 1.0, 1.0, 1.0, 1.0), portraits // 4),
    ):
        who = [i % len(people) for i in range(count)]
        nuisances = sample_nuisances(count, 900 + len(name), style_shares=shares)
        labels = nuisances.labels
        orders = [
            {"who": people.photos[who[i]], "seed": 5000 + i, "steps": STEPS, "prompt": caption(labels, i)}
            for i in range(count)
        ]
        made = torch.stack([_pixels(x) for x in generate(PIPELINES[0], orders)])
        shown = visible(labels)
        for kind, images in (("obeyed", made), ("reader", twins(people, who, nuisances))):
            found = reader.read(images) | {"expression": judge.expression(images)}
            right = {k: (found[k] == labels[k]) & shown[k] for k in ATTRIBUTES}
            result[f"{name}_{kind}"] = {k: float(right[k].sum() / shown[k].sum()) for k in ATTRIBUTES if shown[k].any()}
        pairs = [x for i in range(min(12, count)) for x in (_pixels(people.photos[who[i]]), made[i])]
        save_sheet(torch.stack(pairs), 8, out / f"mini_prompts_{name}.png")
    return result


def measure_pose(people: People, judge: Judge, out: Path, portraits: int) -> dict[str, float]:
    """Distance in pixels between the drawn keypoints and those found, with IdentityNet and with its scale at 0."""
    count = portraits // 2
    who = [i % len(people) for i in range(count)]
    labels = sample_nuisances(count, 800, style="photo", pose=torch.arange(count) % len(ATTRIBUTES["pose"]))
    drawn = places(people, [(i + 1) % len(people) for i in who], labels)
    result: dict[str, float] = {"portraits": portraits}
    for name, scale in (("with", None), ("without", 0.0)):
        plain = {"steps": STEPS, "prompt": "a photo of a person", "structure_scale": scale}
        orders = [{"who": people.photos[who[i]], "seed": 8000 + i, "pose": drawn[i], **plain} for i in range(count)]
        looks = [judge.look(image)[1] for image in generate("instantid", orders)]
        errors = [float(np.linalg.norm(k - d, axis=1).mean()) for k, d in zip(looks, drawn) if k is not None]
        result |= {name: float(np.mean(errors)) if errors else float("nan"), f"{name}_found": len(errors) / count}
    rows = list(range(1, len(people.renders), 7))[:60]
    looks = [judge.look(to_pil(people.renders.images[i].float() / 255))[1] for i in rows]
    true = people.renders.keypoints[rows].numpy()
    errors = [float(np.linalg.norm(k - t, axis=1).mean()) for k, t in zip(looks, true) if k is not None]
    result["detector"] = float(np.mean(errors))
    return result


def measure_autoencoder(people: People, judge: Judge, out: Path, portraits: int) -> dict[str, float]:
    """PSNR of encode-decode, and how much of the likeness between two renders of a person outlives it."""
    backbone = idgen.load(PIPELINES[0], base="mini", device="cpu").backbone
    photos = [
        i for i in range(PER_PERSON * len(people)) if i % PER_PERSON and people.renders.attributes["style"][i] == 0
    ]
    photos = photos[:: max(1, len(photos) // portraits)][:portraits]
    who, errors, before, after = [i // PER_PERSON for i in photos], [], [], []
    for i in photos:
        image = people.renders.images[i : i + 1].float() / 255
        back = backbone.decode(backbone.encode_image(image)).float().cpu().clamp(0, 1)
        errors.append(float(-10 * torch.log10((back - image).pow(2).mean())))
        before.append(to_pil(image[0]))
        after.append(to_pil(back[0]))
    real, kept = judge.likeness(before, who, people), judge.likeness(after, who, people)
    return {"portraits": len(photos), "psnr": float(np.mean(errors)), "own_before": real["own"],
            "own_after": kept["own"], "kept": kept["own"] / real["own"], "rank1_after": kept["rank1"]}  # fmt: skip


def measure_curve(people: People, judge: Judge, out: Path, portraits: int) -> dict[str, Any]:
    """Likeness over identity_scale, the portraits shared out over the scales, in the scenes of the likeness table."""
    count = max(1, portraits // len(SCALES))
    who, labels = casting(people, count)
    curve: dict[str, Any] = {"portraits": count * len(SCALES)}
    for scale in SCALES:
        orders = [
            {"who": people.photos[who[i]], "seed": i, "steps": STEPS, "prompt": caption(labels.labels, i),
             "identity_scale": scale}
            for i in range(count)
        ]  # fmt: skip
        curve[str(scale)] = judge.likeness(generate(PIPELINES[0], orders), who, people)
    return curve


def measure_speed(people: People, judge: Judge, out: Path, portraits: int) -> dict[str, Any]:
    """Seconds for one warm portrait with guidance, by pipeline, and for loading."""
    result: dict[str, Any] = {
        "portraits": 5,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": platform.processor(),
    }
    for pipeline in PIPELINES:
        begun = time.monotonic()
        pipe = idgen.load(pipeline, base="mini", device="cpu")
        loaded = time.monotonic() - begun
        pipe.generate(people.photos[0], SCENES[0]["expression"], seed=0, steps=STEPS)
        spent = []
        for seed in range(5):
            begun = time.monotonic()
            pipe.generate(people.photos[seed], "a photo of a person, smiling", seed=seed, steps=STEPS)
            spent.append(time.monotonic() - begun)
        result[pipeline] = {"load": loaded, "portrait": statistics.median(spent)}
    return result


MEASURES: dict[str, Callable[[People, Judge, Path, int], dict[str, Any]]] = {
    "real renders": measure_real,
    **{name: partial(measure_likeness, name) for name in PIPELINES},
    "prompts": measure_prompts,
    "pose": measure_pose,
    "autoencoder": measure_autoencoder,
    "curve": measure_curve,
    "speed": measure_speed,
}


def _pixels(image: Image.Image) -> torch.Tensor:
    """[3, 128, 128] in 0..1."""
    if image.size != (128, 128):
        image = image.resize((128, 128), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def main() -> None:
    """Measure what was asked for; the other parts of an older JSON stay, each says how many people it was taken on."""
    parser = argparse.ArgumentParser(description="Measure mini on held-out people.")
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument(
        "--portraits", type=int, default=400, help="portraits for each part; 400 is 100 people x 4 prompts"
    )
    parser.add_argument("--only", nargs="*", choices=sorted(MEASURES), default=list(MEASURES))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("idgen").setLevel(logging.ERROR)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "mini_quality.json"
    judge = Judge()
    people = meet(options.people, judge)
    for name in [m for m in MEASURES if m in options.only]:
        print(f"{name} on {len(people)} people", flush=True)
        begun = time.monotonic()
        measured = MEASURES[name](people, judge, options.out, options.portraits)
        # Read now, not at the start: another process may have measured another part meanwhile.
        results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        results[name] = {
            "people": len(people),
            "portraits": options.portraits,
            "seconds": round(time.monotonic() - begun),
            **measured,
        }
        path.write_text(json.dumps(results, indent=1) + "\n")
        write_report(results, options.out)


if __name__ == "__main__":
    main()
