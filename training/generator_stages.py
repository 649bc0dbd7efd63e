"""The stages of the generator and of the adapters that need it."""

from __future__ import annotations

import torch

from . import arc2face, data, face_image, generator, instantid, projector
from .artefacts import latent_sets, load_autoencoder, load_face_teacher, load_generator, load_reader, load_text
from .run import Run

BATCH = {"cpu": 32, "cuda": 512}


def train_generator(run: Run) -> None:
    """UNet, projector and identity keys and values of mini-xl."""
    start = projector.FaceIdProjector()
    start.load_state_dict(torch.load(run.root / "projector_final.pt", weights_only=True))
    generator.train(
        *latent_sets(run),
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
    people, held_out = latent_sets(run)
    face_image.train(
        people,
        data.load(run.root / "shards", "train", limit),
        held_out,
        data.load(run.root / "shards", "validation"),
        load_generator(run).projector,
        run.root,
        run.minutes,
        device=run.device,
        batch=32 if run.kind == "cpu" else 256,
    )


def train_instantid(run: Run) -> None:
    """Resampler, then IdentityNet."""
    sets = latent_sets(run)
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
    sets = latent_sets(run)
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
