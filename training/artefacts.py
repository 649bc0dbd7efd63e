"""What finished stages left in the run folder, loaded for the stages that build on it."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from transformers import CLIPTokenizer

from .expression import load_expression_reader
from .face_teacher import FaceTeacher
from .generator import Generator
from .latent_reader import LatentReader
from .latents import LatentSet
from .loop import load_averaged
from .recogniser import load_recogniser
from .run import Run
from .text import TextEncoders


def latent_sets(run: Run) -> tuple[LatentSet, LatentSet]:
    """Latents of the training and of the validation people."""
    folder = run.root / "latents"
    return LatentSet(folder, "train"), LatentSet(folder, "validation")


def load_autoencoder(run: Run) -> AutoencoderTiny:
    """The trained autoencoder, with the finished decoder if there is one (the latents are the same)."""
    folder = run.root / ("decoder" if run.has("decoder.done.json") else "autoencoder")
    return AutoencoderTiny.from_pretrained(folder).to(run.device).eval().requires_grad_(False)


def load_text(run: Run) -> TextEncoders:
    """The frozen text encoders with their tokenizer."""
    encoders = TextEncoders(CLIPTokenizer.from_pretrained(run.root / "tokenizer"))
    encoders.load_state_dict(torch.load(run.root / "text_final.pt", weights_only=True))
    return encoders.to(run.device).eval().requires_grad_(False)


def load_reader(run: Run) -> LatentReader | None:
    """The latent reader, or None while it is not there."""
    if not run.has("reader_final.pt"):
        return None
    model = LatentReader()
    model.load_state_dict(torch.load(run.root / "reader_final.pt", map_location="cpu", weights_only=True))
    return model.to(run.device).eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def load_face_teacher(run: Run) -> FaceTeacher:
    """Autoencoder, conditioning recogniser and expression reader as a teacher."""
    vae, recogniser = load_autoencoder(run), load_recogniser(run.root / "recogniser_final.pt", run.device)
    for net in (vae, recogniser):
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return FaceTeacher(vae, recogniser, load_expression_reader(run.root / "expression_final.pt", run.device))


def load_generator(run: Run) -> Generator:
    """The generator's averaged weights at its last checkpoint."""
    model = Generator()
    load_averaged(run.root / "generator.pt", {"model": model})
    return model.to(run.device).eval().requires_grad_(False)
