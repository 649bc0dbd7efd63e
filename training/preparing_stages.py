"""The stages up to the generator: data, what sees pictures, what reads captions, what teaches."""

from __future__ import annotations

import torch

from . import attributes, autoencoder, data, detector, expression, latent_reader, latents, projector, recogniser, text
from .artefacts import latent_sets, load_autoencoder
from .facedata import FaceSet
from .heads import render, sample_nuisances, sample_people
from .run import Run
from .sheets import save_sheet

PEOPLE = {"cpu": 60, "cuda": 80}
"""Training shards of 100 people by device."""


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
    net = recogniser.load_recogniser(run.root / "recogniser_final.pt", run.device)
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
    net = recogniser.load_recogniser(run.root / "recogniser_final.pt", run.device)
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
    sets = latent_sets(run)
    pairs = [
        (torch.nn.functional.normalize(s.embeddings[s.photo].float(), dim=1), s.parameters[s.person[s.photo]])
        for s in sets
    ]
    model = projector.FaceIdProjector()
    projector.pretrain(model, *pairs[0], run.root, run.minutes, device=run.device, held_out=pairs[1])
    torch.save(model.cpu().state_dict(), run.root / "projector_final.pt")


def train_reader(run: Run) -> None:
    """The latent reader."""
    sets = latent_sets(run)
    model = latent_reader.train(*sets, run.root, run.minutes, device=run.device, batch=96 if run.kind == "cpu" else 512)
    part = run.root / "reader_final.part"
    torch.save(model.cpu().state_dict(), part)
    part.replace(run.root / "reader_final.pt")


def train_expression(run: Run) -> None:
    """The expression reader."""
    people = FaceSet.read(run.root / "shards", "train", expression.TEACHER_SHARDS)
    held_out = FaceSet.read(run.root / "shards", "validation", 1)
    batch = 64 if run.kind == "cpu" else 256
    model = expression.train(people, held_out, run.root, run.minutes, device=run.device, batch=batch)
    torch.save(model.cpu().state_dict(), run.root / "expression_final.pt")
