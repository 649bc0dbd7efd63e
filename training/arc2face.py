"""mini-sd15 and mini's Arc2Face: one UNet without SDXL's extras, a plain text encoder and a face token encoder.

Everything starts from mini-xl. The context is 512 wide (a face embedding has to fit into one token); its first 128
numbers carry what mini-xl's text context says and the next 128 what an identity token says, so that the key and value
projections of both can be taken over side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from idgen.adapters.face_tokens import TEMPLATE, placeholder_id

from .attention import attach_plain, attention_names
from .backbone import CONTEXT, build_unet, time_ids
from .data import PER_PERSON
from .generator import Generator, Noise, times
from .latent_reader import LatentReader
from .latents import LatentSet
from .loop import Loop
from .projector import EMBEDDING, TOKENS
from .prompter import Prompter
from .sheets import save_sheet
from .text import TextEncoders, config, random_captions, tie_same
from .workers import Workers

FIRST = 5
"""Position of the first identity token in the face encoder's output; "photo of a id person" puts "id" at 4."""


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A text encoder 512 wide, one layer: most of its weight is the width."""
    settings = config(tokenizer, hidden=EMBEDDING, layers=1, heads=8)
    settings.intermediate_size = EMBEDDING // 2
    model = CLIPTextModel(settings)
    # mini-xl's text tokens are about 4 long per number and its identity tokens 1: start in the right range.
    gain = next(p for name, p in model.named_parameters() if name.endswith("final_layer_norm.weight"))
    gain.data[:CONTEXT] = 5.0
    gain.data[CONTEXT : 2 * CONTEXT] = 2.0
    return model


class FaceTokens(nn.Module):
    """Arc2Face's encoder: the template's token "id" replaced by the (unit) face embedding."""

    ids: Tensor

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.encoder = build_encoder(tokenizer)
        ids = tokenizer(
            TEMPLATE, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        blank = tokenizer(
            "", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("blank", blank, persistent=False)
        self.at = int((ids[0] == placeholder_id(tokenizer)).nonzero()[0])
        # The embedding of a word is about 22 long; a unit embedding at the same place would hardly be heard.
        words = self.encoder.get_input_embeddings()
        assert isinstance(words, nn.Embedding)
        nn.init.normal_(words.weight, std=EMBEDDING**-0.5)

    def forward(self, embeddings: Tensor, nobody: Tensor | None = None) -> Tensor:
        """Unit embeddings [n, 512] -> context [n, L, 512]; rows with ``nobody`` get the empty prompt."""
        words = self.encoder.get_input_embeddings()(self.ids).expand(len(embeddings), -1, -1).clone()
        words[:, self.at] = embeddings.to(words.dtype)
        if nobody is not None:
            words = torch.where(nobody.view(-1, 1, 1), self.encoder.get_input_embeddings()(self.blank), words)
        # transformers' text model takes ids only: put the embeddings in where it looks them up.
        handle = self.encoder.get_input_embeddings().register_forward_hook(lambda *_: words)
        try:
            return self.encoder(self.ids.expand(len(words), -1)).last_hidden_state
        finally:
            handle.remove()


def pretrain_encoders(
    data: LatentSet,
    text: TextEncoders,
    generator: Generator,
    root: Path,
    minutes: float,
    *,
    device: str = "cpu",
    batch: int = 48,
) -> tuple[CLIPTextModel, FaceTokens]:
    """Teach both encoders to speak mini-xl's language in their first 256 numbers: text in 0..127, identity in
    128..255.
    """
    torch.manual_seed(91)
    encoder = build_encoder(text.tokenizer)
    encoder.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides that this is a method
    faces = FaceTokens(text.tokenizer).to(device)
    text = text.to(device).eval().requires_grad_(False)
    projector = generator.projector.to(device).eval().requires_grad_(False)
    with torch.no_grad():
        plain, _ = text(text.ids(["a photo of a person", ""]).to(device))
    loop = Loop(
        "sd15_encoders",
        root,
        {"encoder": encoder, "faces": faces},
        minutes,
        rate=2e-3,
        decay=0.8,
        averaging=0.99,
        muon=False,
    )
    while loop.going:
        prompts, _ = random_captions(batch, 50_000 + loop.steps)
        ids = text.ids(prompts).to(device)
        with torch.no_grad():
            goal, _ = text(ids)
            rows = torch.randint(0, len(data), (batch,))
            e = data.references(rows).to(device)
            tokens = projector(e)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            said, out = encoder(ids).last_hidden_state, faces(e)
        said, out = said.float(), out.float()
        # Text slots say "no identity" with zeros in the identity half, and the other way round.
        text_miss = (said[..., :CONTEXT] - goal).pow(2).mean() / goal.pow(2).mean()
        loss = text_miss + 0.1 * said[..., CONTEXT : 2 * CONTEXT].pow(2).mean()
        want = plain[:1, :FIRST].expand(batch, -1, -1)
        loss = loss + (out[:, :FIRST, :CONTEXT] - want).pow(2).mean() / want.pow(2).mean()
        places = torch.arange(FIRST, out.shape[1], device=device)
        which = (places - FIRST) % TOKENS  # the identity tokens over and over: more of the softmax's weight for them
        face_miss = (out[:, places, CONTEXT : 2 * CONTEXT] - tokens[:, which]).pow(2).mean()
        loss = loss + face_miss + 0.01 * out[:, places, :CONTEXT].pow(2).mean()
        loop.update(loss, batch, text=float(text_miss.detach()), face=float(face_miss.detach()))
    loop.finish()
    tie_same(text.tokenizer, encoder)
    return encoder.eval(), faces


@torch.no_grad()
def from_xl(generator: Generator, text: TextEncoders) -> UNet2DConditionModel:
    """An SD1.5-style UNet from mini-xl's: pooled text and sizes become a constant, keys and values stand side by
    side.
    """
    device = next(generator.unet.parameters()).device
    source = generator.unet
    unet = build_unet(EMBEDDING, xl=False, channels=tuple(source.config["block_out_channels"]))
    unet.to(device)  # type: ignore[arg-type]  # diffusers' wrapper hides that this is a method
    state, own = source.state_dict(), unet.state_dict()
    for key, value in state.items():
        if key in own and own[key].shape == value.shape:
            own[key] = value.clone()
    numbers = {name: str(i) for i, name in enumerate(attention_names(source))}
    for name in attention_names(source):
        if not name.endswith("attn2"):
            continue
        pair: Any = generator.keys.layers[numbers[name]]
        for kind, adapter in (("to_k", "to_k_ip"), ("to_v", "to_v_ip")):
            wide = torch.zeros_like(own[f"{name}.{kind}.weight"])
            wide[:, :CONTEXT] = state[f"{name}.{kind}.weight"]
            wide[:, CONTEXT : 2 * CONTEXT] = pair[adapter].weight
            wide[:, 2 * CONTEXT :].normal_(std=0.02)
            own[f"{name}.{kind}.weight"] = wide
    _, pooled = text.to(device)(text.ids(random_captions(256, 77)[0]).to(device))
    sizes = source.add_time_proj(time_ids(256, device).flatten()).view(256, -1)
    extra = source.add_embedding(torch.cat([pooled, sizes.to(pooled.dtype)], 1)).mean(0)
    own["time_embedding.linear_2.bias"] = own["time_embedding.linear_2.bias"] + extra
    unet.load_state_dict(own)
    return unet


def train(
    data: LatentSet,
    held_out: LatentSet,
    text: TextEncoders,
    generator: Generator,
    vae: AutoencoderTiny,
    root: Path,
    minutes: float,
    *,
    device: str = "cpu",
    workers: Workers | None = None,
    batch: int = 24,
    rate: float = 1.5e-3,
    face_share: float = 0.75,
    reader: LatentReader | None = None,
    reader_weight: float = 0.15,
    save_every: float = 150.0,
    encoders: tuple[CLIPTextModel, FaceTokens] | None = None,
    name: str = "arc2face",
) -> tuple[UNet2DConditionModel, CLIPTextModel, FaceTokens]:
    """Fine-tune the UNet, with face tokens for ``face_share`` of the samples and plain captions for the rest."""
    workers = workers or Workers()
    torch.manual_seed(92)
    encoder, faces = encoders or (build_encoder(text.tokenizer), FaceTokens(text.tokenizer))
    encoder.eval().requires_grad_(False).to(device)
    faces.to(device).train().requires_grad_(True)
    unet = from_xl(generator, text).train().requires_grad_(True)
    unet.to(device)  # type: ignore[arg-type]  # diffusers' wrapper hides that this is a method
    attach_plain(unet)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # as above
    prompter, noise = Prompter(text, device, seed=workers.rank), Noise(device)
    photos = data.photo.nonzero().flatten()

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return unet(x, t, encoder_hidden_states=context).sample.float()

    def look() -> dict[str, float]:
        unet.eval()
        n = 24
        first = torch.arange(8) % (len(held_out) // PER_PERSON)
        people = first.repeat_interleave(3)
        refs = F.normalize(held_out.embeddings[people * PER_PERSON].float(), dim=1).to(device)
        z = sample_faces(unet, faces, refs)
        found = {}
        if reader is not None:
            unit, _, _ = reader(z)
            cosine = unit @ held_out.centres[:100].to(device).T
            found = {"sampled_own": float(cosine[torch.arange(n), people.to(device)].mean())}
        both = torch.cat(
            [held_out.latents[first * PER_PERSON].to(device).float()[:, None], z.view(8, 3, *z.shape[1:])], 1
        ).flatten(0, 1)
        save_sheet(vae.decode(both).sample.float().clamp(-1, 1) / 2 + 0.5, 8, root / f"{name}.sheet.png")
        unet.train()
        return found

    loop = Loop(
        name,
        root,
        {"unet": unet, "faces": faces},
        minutes,
        rate=rate,
        workers=workers,
        decay=0.7,
        averaging=0.997,
        on_save=look,
        save_every=save_every,
    )
    torch.manual_seed(30_000 + 97 * loop.steps + workers.rank)
    prompter.rng.seed(30_000 + 97 * loop.steps + workers.rank)
    split = int(batch * face_share)
    while loop.going:
        # Faces: photos only, as Arc2Face's own data; captions: everything.
        rows = torch.cat(
            [photos[torch.randint(0, len(photos), (split,))], torch.randint(0, len(data), (batch - split,))]
        )
        weight = 1 + 1.5 * data.masks[rows].float() / 255
        weight = (weight / weight.mean((1, 2, 3), keepdim=True)).to(device)
        nobody = torch.rand(split, device=device) < 0.1
        e = data.references(rows[:split]).to(device)
        ids, _ = prompter.ids(data.labels, rows[split:], torch.rand(batch - split) < 0.12)
        t = times(batch, loop.fraction, device)
        x, target, a, s = noise.add(data.latents[rows].to(device).float(), t)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            with torch.no_grad():
                said = encoder(ids).last_hidden_state
            v = predict(x, t, torch.cat([faces(e, nobody), said.to(faces.ids.device)]))
        loss = ((v - target).pow(2) * weight).mean()
        shown: dict[str, float] = {"mse": float(loss.detach())}
        if reader is not None:
            use = (t[:split] < 700).float() * a.flatten()[:split] * ~nobody
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                unit, known, _ = reader((a * x - s * v)[:split])
            person = data.person[rows[:split]]
            own = (unit * data.centres[person].to(device)).sum(1)
            miss = (known - data.parameters[person].to(device)).pow(2).mean(1)
            loss = loss + reader_weight * ((1 - own + 0.3 * miss) * use).sum() / batch
            shown["own"] = float((own * use).sum().detach() / use.sum().clamp(min=1e-3))
        loop.update(loss, batch, **shown)
    loop.finish()
    return unet.eval(), encoder, faces.eval()


@torch.no_grad()
def sample_faces(
    unet: UNet2DConditionModel, faces: FaceTokens, embeddings: Tensor, steps: int = 15, guidance: float = 3.0
) -> Tensor:
    """DDIM with guidance from unit embeddings [n, 512] to latents."""
    from .backbone import scheduler

    n, device = len(embeddings), embeddings.device
    x = torch.stack([torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(n)]).to(device)
    nobody = torch.cat([torch.zeros(n), torch.ones(n)]).bool().to(device)
    context = faces(torch.cat([embeddings, embeddings]), nobody)
    plan: Any = scheduler()
    plan.set_timesteps(steps)
    for t in plan.timesteps:
        v = unet(torch.cat([x, x]), t.to(device).expand(2 * n), encoder_hidden_states=context).sample.float()
        yes, no = v.chunk(2)
        x = plan.step(no + guidance * (yes - no), t, x).prev_sample
    return x
