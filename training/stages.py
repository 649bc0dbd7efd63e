"""The stages of making mini, in order: each reads what earlier ones left in the run folder and can be run again
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from . import (
    arc2face,
    autoencoder,
    data,
    face_image,
    face_teacher,
    generator,
    instantid,
    latent_reader,
    latents,
    projector,
    text,
)
from .heads import render, sample_nuisances, sample_people
from .latents import LatentSet
from .loop import load_averaged
from .sheets import save_sheet
from .workers import Workers, join_workers, launch

PEOPLE = {"cpu": 60, "cuda": 80}
"""Training shards of 100 people by device."""
BATCH = {"cpu": 32, "cuda": 512}


@dataclass
class Run:
    """Where and how a stage runs. ``minutes`` is the stage's own budget; ``workers``: CPU processes for the long
    stages.
    """

    root: Path
    device: str = "cpu"
    minutes: float = 1.0
    workers: int = 3
    shards: int = 0
    group: Workers = field(default_factory=Workers)

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return torch.device(self.device).type

    def has(self, name: str) -> bool:
        """Whether a result is there."""
        return (self.root / name).exists()


def sheet(run: Run) -> None:
    """Two contact sheets of the renderer: people, and one person in many circumstances."""
    people = sample_people(32, 5).to(run.device)
    plain = sample_nuisances(
        32,
        1,
        jitter=0,
        pose="front",
        expression="neutral",
        light="soft",
        style="photo",
        glasses=0,
        hat=0,
        background="gray",
        shirt="blue",
    )
    save_sheet(render(people, plain).images, 8, run.root / "sheet_people.png")
    some = people[[0, 3, 9, 14]].repeat_interleave(8, 0)
    save_sheet(render(some, sample_nuisances(32, 3)).images, 8, run.root / "sheet_variation.png")


def render_data(run: Run) -> None:
    """Training and validation shards; on a CPU shared between the workers."""
    counts = {"validation": 3, "train": run.shards or PEOPLE[run.kind]}
    for _ in data.make(run.root / "shards", counts, device=run.device, part=run.group.rank, parts=run.group.count):
        pass


def faces(run: Run) -> None:
    """Recogniser, scorer, detector and attribute reader (modules recogniser, detector and attributes)."""
    from . import attributes, detector, recogniser
    from .facedata import FaceSet

    people = FaceSet.read(run.root / "shards", "train")
    total = run.minutes
    if not run.has("recogniser_final.pt"):
        recogniser.train(people, "recogniser", 0.35 * total, run.root / "recogniser.pt", device=run.device)
        # Pinned under another name: the generator's condition must never change under it.
        (run.root / "recogniser_final.pt").write_bytes((run.root / "recogniser.pt").read_bytes())
    if not run.has("scorer.pt"):
        recogniser.train(people, "scorer", 0.25 * total, run.root / "scorer.pt", seed=2, regress=2.0, device=run.device)
    if not run.has("detector.pt"):
        detector.train(people, 0.30 * total, run.root / "detector.pt", device=run.device)
    if not run.has("attributes.safetensors"):
        attributes.train(people, 0.10 * total, run.root / "attributes.safetensors", device=run.device)


def train_autoencoder(run: Run) -> None:
    """The picture autoencoder."""
    size = autoencoder.CUDA_SIZE if run.kind == "cuda" else autoencoder.CPU_SIZE
    limit = None if run.kind == "cuda" else 30
    autoencoder.train(
        data.load(run.root / "shards", "train", limit),
        data.load(run.root / "shards", "validation", 1),
        run.root,
        run.minutes,
        size=size,
        device=run.device,
        workers=run.group,
        rate=4e-3,
        batch=96 if run.kind == "cuda" else 24,
    )


def finish_decoder(run: Run) -> None:
    """Go on with the decoder alone, with the recogniser's opinion in the loss. Changes no latents."""
    from .recogniser import load_recogniser

    net = load_recogniser(run.root / "recogniser_final.pt", run.device)
    autoencoder.train(
        data.load(run.root / "shards", "train", None if run.kind == "cuda" else 20),
        data.load(run.root / "shards", "validation", 1),
        run.root,
        run.minutes,
        device=run.device,
        workers=run.group,
        rate=1.5e-3,
        batch=96 if run.kind == "cuda" else 24,
        likeness=autoencoder.reader(net),
        decoder_only=True,
        start=run.root / "autoencoder",
        name="decoder",
    )


def train_text(run: Run) -> None:
    """Tokenizer and both text encoders."""
    tokenizer = text.write_tokenizer(run.root / "tokenizer")
    torch.manual_seed(20)
    encoders = text.TextEncoders(tokenizer)
    right = text.pretrain(encoders, run.root, run.minutes, device=run.device)
    print(f"attributes read right off fresh captions: {right:.3f}")
    torch.save(encoders.cpu().state_dict(), run.root / "text_final.pt")


def encode(run: Run) -> None:
    """Latents and embeddings of all shards."""
    from .recogniser import load_recogniser

    net = load_recogniser(run.root / "recogniser_final.pt", run.device)
    latents.make(
        run.root / "shards",
        run.root / "latents",
        load_autoencoder(run),
        net,
        device=run.device,
        part=run.group.rank,
        parts=run.group.count,
    )


def train_projector(run: Run) -> None:
    """Pre-training of the FaceID projector."""
    sets = [LatentSet(run.root / "latents", split) for split in ("train", "validation")]
    pairs = [
        (torch.nn.functional.normalize(s.embeddings[s.photo].float(), dim=1), s.parameters[s.person[s.photo]])
        for s in sets
    ]
    model = projector.FaceIdProjector()
    projector.pretrain(model, *pairs[0], run.root, run.minutes, device=run.device, held_out=pairs[1])
    torch.save(model.cpu().state_dict(), run.root / "projector_final.pt")


def train_reader(run: Run) -> None:
    """The latent reader."""
    sets = [LatentSet(run.root / "latents", split) for split in ("train", "validation")]
    model = latent_reader.train(*sets, run.root, run.minutes, device=run.device, batch=96 if run.kind == "cpu" else 512)
    part = run.root / "reader_final.part"
    torch.save(model.cpu().state_dict(), part)
    part.replace(run.root / "reader_final.pt")


def train_expression(run: Run) -> None:
    """The expression reader."""
    from . import expression
    from .facedata import FaceSet

    sets = [FaceSet.read(run.root / "shards", "train", 45), FaceSet.read(run.root / "shards", "validation", 1)]
    model = expression.train(*sets, run.root, run.minutes, device=run.device, batch=64 if run.kind == "cpu" else 256)
    torch.save(model.cpu().state_dict(), run.root / "expression_final.pt")


def load_face_teacher(run: Run) -> face_teacher.FaceTeacher:
    """Autoencoder, conditioning recogniser and expression reader as a teacher."""
    from .expression import load_expression_reader
    from .recogniser import load_recogniser

    return face_teacher.FaceTeacher(
        load_autoencoder(run).to(memory_format=torch.channels_last),
        load_recogniser(run.root / "recogniser_final.pt", run.device).to(memory_format=torch.channels_last),
        load_expression_reader(run.root / "expression_final.pt", run.device),
    )


def train_generator(run: Run) -> None:
    """UNet, projector and identity keys and values of mini-xl."""
    start = projector.FaceIdProjector()
    start.load_state_dict(torch.load(run.root / "projector_final.pt", weights_only=True))
    generator.train(
        LatentSet(run.root / "latents", "train"),
        LatentSet(run.root / "latents", "validation"),
        load_text(run),
        start,
        load_autoencoder(run),
        run.root,
        run.minutes,
        device=run.device,
        workers=run.group,
        batch=BATCH[run.kind],
        find_reader=lambda: load_reader(run),
        face_teacher=load_face_teacher(run),
        save_every=240 if run.kind == "cpu" else 100,
        rate=3e-3 if run.kind == "cpu" else 4e-3,
    )


def train_face_image(run: Run) -> None:
    """Image encoder and perceiver of PlusV2."""
    limit = 30 if run.kind == "cpu" else None
    face_image.train(
        LatentSet(run.root / "latents", "train"),
        data.load(run.root / "shards", "train", limit),
        LatentSet(run.root / "latents", "validation"),
        data.load(run.root / "shards", "validation"),
        load_generator(run).projector,
        run.root,
        run.minutes,
        device=run.device,
        batch=32 if run.kind == "cpu" else 256,
    )


def train_instantid(run: Run) -> None:
    """Resampler, then IdentityNet."""
    sets = [LatentSet(run.root / "latents", split) for split in ("train", "validation")]
    model = load_generator(run)
    resampler = instantid.build_resampler()
    if not run.has("resampler_final.pt"):
        if run.group.first:
            share = min(1.5, 0.15 * run.minutes)
            resampler = instantid.train_resampler(*sets, model.projector, run.root, share, device=run.device)
            torch.save(resampler.cpu().state_dict(), run.root / "resampler_final.pt")
        run.group.mean_(torch.zeros(1))  # the others wait here
    resampler.load_state_dict(torch.load(run.root / "resampler_final.pt", weights_only=True))
    instantid.train_identity_net(
        *sets,
        load_text(run),
        model,
        resampler,
        load_autoencoder(run),
        run.root,
        0.85 * run.minutes,
        device=run.device,
        workers=run.group,
        batch=24 if run.kind == "cpu" else 256,
    )


def train_arc2face(run: Run) -> None:
    """Text and face encoders of mini-sd15, then its UNet."""
    sets = [LatentSet(run.root / "latents", split) for split in ("train", "validation")]
    model, words = load_generator(run), load_text(run)
    encoders = arc2face.build_encoder(words.tokenizer), arc2face.FaceTokens(words.tokenizer)
    if not run.has("sd15_encoders_final.pt"):
        if run.group.first:
            encoders = arc2face.pretrain_encoders(
                sets[0],
                words,
                model,
                run.root,
                min(2.0, 0.2 * run.minutes),
                device=run.device,
                batch=48 if run.kind == "cpu" else 256,
            )
            torch.save([m.cpu().state_dict() for m in encoders], run.root / "sd15_encoders_final.pt")
        run.group.mean_(torch.zeros(1))
    for m, state in zip(encoders, torch.load(run.root / "sd15_encoders_final.pt", weights_only=True)):
        m.load_state_dict(state)
    arc2face.train(
        *sets,
        words,
        model,
        load_autoencoder(run),
        run.root,
        0.8 * run.minutes,
        device=run.device,
        workers=run.group,
        batch=BATCH[run.kind],
        reader=load_reader(run),
        encoders=encoders,
    )


def load_autoencoder(run: Run) -> AutoencoderTiny:
    """The trained autoencoder, with the finished decoder if there is one (the latents are the same)."""
    folder = run.root / ("decoder" if run.has("decoder.done.json") else "autoencoder")
    return AutoencoderTiny.from_pretrained(folder).to(run.device).eval().requires_grad_(False)


def load_text(run: Run) -> text.TextEncoders:
    """The frozen text encoders with their tokenizer."""
    encoders = text.TextEncoders(text.CLIPTokenizer.from_pretrained(run.root / "tokenizer"))
    encoders.load_state_dict(torch.load(run.root / "text_final.pt", weights_only=True))
    return encoders.to(run.device).eval().requires_grad_(False)


def load_reader(run: Run) -> latent_reader.LatentReader | None:
    """The latent reader, or None while it is not there."""
    if not run.has("reader_final.pt"):
        return None
    model = latent_reader.LatentReader()
    model.load_state_dict(torch.load(run.root / "reader_final.pt", map_location="cpu", weights_only=True))
    return model.to(run.device).eval().requires_grad_(False).to(memory_format=torch.channels_last)


def load_generator(run: Run) -> generator.Generator:
    """The generator's averaged weights at its last checkpoint."""
    model = generator.Generator()
    load_averaged(run.root / "generator.pt", {"model": model})
    return model.to(run.device).eval().requires_grad_(False)


@dataclass(frozen=True)
class Stage:
    """A stage, the file that says it is done, its share of a whole run's time and whether CPU workers share it."""

    work: Callable[[Run], None]
    result: str
    share: float
    shared: bool = False


STAGES: dict[str, Stage] = {
    "data": Stage(render_data, "shards", 0.09, shared=True),
    "text": Stage(train_text, "text_final.pt", 0.02),
    "faces": Stage(faces, "attributes.safetensors", 0.18),
    "autoencoder": Stage(train_autoencoder, "autoencoder.done.json", 0.14, shared=True),
    "latents": Stage(encode, "latents", 0.02, shared=True),
    "projector": Stage(train_projector, "projector_final.pt", 0.01),
    "reader": Stage(train_reader, "reader_final.pt", 0.03),
    "expression": Stage(train_expression, "expression_final.pt", 0.02),
    "generator": Stage(train_generator, "generator.done", 0.30, shared=True),
    "decoder": Stage(finish_decoder, "decoder.done.json", 0.04),
    "face-image": Stage(train_face_image, "face_image.done", 0.03),
    "instantid": Stage(train_instantid, "identity_net.done", 0.06, shared=True),
    "arc2face": Stage(train_arc2face, "arc2face.done", 0.06, shared=True),
}
"""In order. `latents` and `data` complete what is missing, so they always run."""


def run_stage(name: str, run: Run, again: list[str]) -> None:
    """Run one stage here, or as several workers when it can be shared; ``again`` are the arguments to repeat for them.

    The marker file is written only when the budget is used up, so an interrupted stage goes on where it stopped.
    """
    stage = STAGES[name]
    marker = run.root / stage.result
    always = name in ("data", "latents")
    if marker.exists() and not always:
        print(f"{name}: done already ({marker})")
        return
    run.root.mkdir(parents=True, exist_ok=True)
    if stage.shared and run.kind == "cpu" and run.workers > 1 and run.group.count == 1:
        launch(again, run.workers)
        return
    stage.work(run)
    if run.group.first and stage.result.endswith(".done"):
        marker.touch()


def all_stages(run: Run, total: float, command: Callable[[str, float], list[str]]) -> None:
    """Every stage with its share of ``total`` minutes; ``command`` gives the arguments that run one stage."""
    sheet(run)
    for name, stage in STAGES.items():
        run.minutes = stage.share * total
        run_stage(name, run, command(name, run.minutes))


__all__ = ["STAGES", "Run", "all_stages", "join_workers", "run_stage", "sheet"]
