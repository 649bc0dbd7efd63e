"""Training of mini-xl: the UNet together with the FaceID projector and its key and value projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor, nn

from .attention import IdentityKeyValues
from .backbone import GUIDANCE, build_unet, scheduler, time_ids
from .data import PER_PERSON
from .face_teacher import FaceTeacher
from .heads import caption
from .latent_reader import LatentReader, attribute_loss
from .latents import LatentSet
from .loop import Loop
from .projector import FaceIdProjector
from .prompter import Prompter
from .sheets import save_sheet
from .text import TextEncoders
from .workers import Workers

DROP_BOTH, DROP_CAPTION, DROP_IDENTITY = 0.08, 0.04, 0.04
"""Guidance dropout. Joint, or there would be next to no samples with neither (Ho & Salimans, 2022, need them)."""


class Generator(nn.Module):
    """UNet, identity projector and identity key/value projections; predicts v."""

    def __init__(self, channels: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.unet = build_unet(channels=channels) if channels else build_unet()
        self.keys = IdentityKeyValues(self.unet)
        self.projector = FaceIdProjector()
        self.keys.attach(self.unet)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, tokens: Tensor, scale: float = 1.0, **extra: Any
    ) -> Tensor:
        """Noised latents x [n, 8, 16, 16], times t [n], text context and pooled, identity tokens [n, N, C] -> v."""
        return self.unet(
            x,
            t,
            encoder_hidden_states=context,
            cross_attention_kwargs={"identity_tokens": tokens, "identity_scale": scale},
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids(len(x), x.device)},
            **extra,
        ).sample.float()


class Noise:
    """The forward process at continuous batches of times."""

    def __init__(self, device: torch.device | str) -> None:
        self.alphas = scheduler().alphas_cumprod.to(device)

    def add(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noised latents, the v target, sqrt(alpha) and sqrt(1 - alpha) [n, 1, 1, 1]."""
        a = self.alphas[t].sqrt().view(-1, 1, 1, 1)
        s = (1 - self.alphas[t]).sqrt().view(-1, 1, 1, 1)
        noise = torch.randn_like(x)
        return (a * x + s * noise).contiguous(memory_format=torch.channels_last), a * noise - s * x, a, s


def times(n: int, done: float, device: torch.device | str) -> Tensor:
    """Training times: uniform, with a third extra where the layout (first half of the run), then the face, is
    decided.
    """
    low, high = (450, 1000) if done < 0.5 else (150, 700)
    t = torch.where(torch.rand(n) < 0.33, torch.randint(low, high, (n,)), torch.randint(0, 1000, (n,)))
    return t.to(device)


@torch.no_grad()
def sample(
    generator: nn.Module,
    prompter: Prompter,
    prompts: Sequence[str],
    tokens: Tensor,
    none: Tensor,
    *,
    seed: int = 0,
    steps: int = 15,
    guidance: float = GUIDANCE,
    scale: float = 1.0,
    **extra: Any,
) -> Tensor:
    """DDIM with guidance: prompts and identity tokens [n, N, C] (``none`` [1, N, C]: those of nobody) -> latents."""
    device = tokens.device
    n = len(prompts)
    x = torch.stack(
        [torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(seed * 1000 + i)) for i in range(n)]
    )
    x = x.to(device)
    context, pooled = prompter([*prompts, *[""] * n])
    both = torch.cat([tokens, none.expand_as(tokens)])
    plan: Any = scheduler()
    plan.set_timesteps(steps)
    for t in plan.timesteps:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            v = generator(torch.cat([x, x]), t.to(device).expand(2 * n), context, pooled, both, scale, **extra)
        yes, no = v.chunk(2)
        x = plan.step(no + guidance * (yes - no), t, x).prev_sample
    return x


def train(
    data: LatentSet,
    held_out: LatentSet,
    text: TextEncoders,
    projector: FaceIdProjector,
    vae: AutoencoderTiny,
    root: Path,
    minutes: float,
    *,
    device: str = "cpu",
    workers: Workers | None = None,
    batch: int = 24,
    rate: float = 3e-3,
    find_reader: Callable[[], LatentReader | None] | None = None,
    reader_weight: float = 0.15,
    reader_from: float = 0.2,
    face_teacher: FaceTeacher | None = None,
    face_weight: float = 0.3,
    save_every: float = 240.0,
    averaging: float = 0.998,
    name: str = "generator",
    muon: bool = True,
    channels: tuple[int, ...] | None = None,
) -> Generator:
    """Train and return the averaged generator; resumable by ``root / name``.

    ``find_reader`` is asked for the latent reader from ``reader_from`` of the run on, until it has one: the reader may
    still be in training when the generator starts. ``face_teacher`` teaches from the same time on.
    """
    reader: LatentReader | None = None
    workers = workers or Workers()
    torch.manual_seed(51)
    model = Generator(channels)
    model.projector.load_state_dict(projector.state_dict())
    model.to(device).train()
    model.unet.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # diffusers' wrapper hides that this is a method
    prompter = Prompter(text.to(device), device, seed=workers.rank)
    noise = Noise(device)
    kind = torch.device(device).type
    loop = Loop(
        name,
        root,
        {"model": model},
        minutes,
        rate=rate,
        workers=workers,
        muon=muon,
        decay=0.5,
        averaging=averaging,
        save_every=save_every,
        on_save=lambda: look(model, prompter, held_out, vae, reader, root, name, device),
    )
    torch.manual_seed(10_000 + 97 * loop.steps + workers.rank)
    prompter.rng.seed(10_000 + 97 * loop.steps + workers.rank)
    while loop.going:
        b = data.batch(batch, device, 1.5)
        chance = torch.rand(batch)
        no_caption = chance < DROP_BOTH + DROP_CAPTION
        no_identity = (chance < DROP_BOTH) | (chance > 1 - DROP_IDENTITY)
        context, pooled, said = prompter.speak(data.labels, b.rows, no_caption)
        t = times(batch, loop.fraction, device)
        x, target, a, s = noise.add(b.latents, t)
        with torch.autocast(kind, torch.bfloat16):
            tokens = model.projector(b.references * (~no_identity)[:, None].to(device))
            v = model(x, t, context, pooled, tokens)
        loss = mse = ((v - target).pow(2) * b.weights).mean()
        shown = {"mse": float(mse.detach())}
        if reader is None and find_reader and loop.fraction >= reader_from and loop.steps % 25 == 0:
            reader = find_reader()
        if reader is not None:
            taught, own = teach(reader, a * x - s * v, a, t, b.rows, b.labels, said, no_identity.to(device), data)
            loss = loss + reader_weight * taught
            shown["own"] = own
        if face_teacher is not None and loop.fraction >= reader_from:
            away, own = face_teacher(a * x - s * v, a, t, b.rows, said["expression"], no_identity.to(device), data)
            loss = loss + face_weight * away
            shown["face_own"] = own
        loop.update(loss, batch, **shown)
    loop.finish()
    return model.eval()


def teach(
    reader: LatentReader,
    clean: Tensor,
    a: Tensor,
    t: Tensor,
    rows: Tensor,
    labels: dict[str, Tensor],
    said: dict[str, Tensor],
    nobody: Tensor,
    data: LatentSet,
) -> tuple[Tensor, float]:
    """How far the predicted clean latents are, to the reader's eye, from the right person and the said attributes.

    Only where the prediction is sharp enough to be read (t < 700), weighted by sqrt(alpha). Returns the loss and the
    mean cosine to the person.
    """
    use = (t < 700).float() * a.flatten()
    with torch.autocast(clean.device.type, torch.bfloat16):
        unit, parameters, scores = reader(clean)
    person = data.person[rows]
    own = (unit * data.centres[person].to(clean.device)).sum(1)
    miss = (parameters - data.parameters[person].to(clean.device)).pow(2).mean(1)
    known = use * (~nobody)
    identity = ((1 - own + 0.3 * miss) * known).sum() / len(t)
    spoken = {k: said[k].to(clean.device) * use for k in scores}
    return identity + 0.5 * attribute_loss(scores, labels, spoken), float(
        (own.detach() * known).sum() / known.sum().clamp(min=1e-3)
    )


@torch.no_grad()
def look(
    model: Generator,
    prompter: Prompter,
    held_out: LatentSet,
    vae: AutoencoderTiny,
    reader: LatentReader | None,
    root: Path,
    name: str,
    device: str,
    n: int = 64,
) -> dict[str, float]:
    """Held-out numbers: how much worse x0 gets with a wrong person or caption, likeness to the reader; and a sheet."""
    model.eval()
    state = torch.get_rng_state()
    torch.manual_seed(7)
    noise = Noise(device)
    people = torch.arange(n) % (len(held_out) // PER_PERSON)
    rows = people * PER_PERSON + 1 + torch.arange(n) % (PER_PERSON - 1)
    x = held_out.latents[rows].to(device).float()
    refs = F.normalize(held_out.embeddings[people * PER_PERSON].float(), dim=1).to(device)
    prompts = [caption(held_out.labels, int(i)) for i in rows]
    found: dict[str, float] = {}
    t = torch.full((n,), 850, device=device)
    noised, _, a, s = noise.add(x, t)
    error = {}
    for key, words, e in (
        ("right", prompts, refs),
        ("person", prompts, refs.roll(13, 0)),
        ("caption", prompts[29:] + prompts[:29], refs),
    ):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            v = model(noised, t, *prompter(words), model.projector(e))
        error[key] = float((a * noised - s * v - x).pow(2).mean())
    found |= {
        "error": error["right"],
        "person_gap": error["person"] - error["right"],
        "caption_gap": error["caption"] - error["right"],
    }
    none = model.projector(torch.zeros(1, 512, device=device))
    shown = sheet_prompts()
    ids = people[:6].repeat_interleave(len(shown))
    z = sample(model, prompter, shown * 6, model.projector(refs[ids]), none)
    if reader is not None:
        unit, _, _ = reader(z)
        cosine = unit @ held_out.centres[:100].to(device).T
        found["sampled_own"] = float(cosine[torch.arange(len(ids)), ids.to(device)].mean())
        found["sampled_rank1"] = float((cosine.argmax(1).cpu() == ids).float().mean())
    pictures = vae.decode(z).sample.float().clamp(-1, 1) / 2 + 0.5
    first = (
        vae.decode(held_out.latents[people[:6] * PER_PERSON].to(device).float()).sample.float().clamp(-1, 1) / 2 + 0.5
    )
    grid = torch.cat([first[:, None], pictures.view(6, len(shown), *pictures.shape[1:])], 1)
    save_sheet(grid.flatten(0, 1), len(shown) + 1, root / f"{name}.sheet.png")
    torch.set_rng_state(state)
    model.train()
    return found


def sheet_prompts() -> list[str]:
    """The prompts of the sample sheets."""
    return [
        "a photo of a person, with a neutral face, facing the camera, soft light, gray background",
        "a photo of a person, smiling, looking right, wearing a red shirt, soft light, blue background",
        "a photo of a person, looking surprised, facing the camera, wearing a white shirt, wearing glasses, "
        "purple background",
        "a photo of a person, with closed eyes, wearing a blue shirt, wearing a red hat, soft light, white background",
        "a photo of a person, laughing, looking left, wearing a green shirt, warm light, yellow background",
        "a pencil sketch of a person, smiling, facing the camera",
    ]
