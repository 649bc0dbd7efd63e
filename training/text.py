"""Tokenizers and text encoders of mini: CLIP's formats, a small byte-level BPE, pre-training on what captions say.

A text encoder trained through the diffusion loss alone is very slow to tell captions apart, so both are first taught to
let every attribute be read off the mean context and the pooled vector; after that they stay frozen.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .captions import CLASSES, QUERIES, SAME, blank_caption, meanings, random_caption, words
from .heads import sample_nuisances
from .loop import Loop

LENGTH = 40
"""Tokens of a prompt, start and end included."""
START, END = "<|startoftext|>", "<|endoftext|>"
HIDDEN = 64


def write_tokenizer(folder: Path, length: int = LENGTH) -> CLIPTokenizer:
    """Write vocab.json and merges.txt of a CLIP BPE in which every word of our captions is one token.

    Any other text is spelt with shorter pieces, in the worst case bytes.
    """
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(
        vocab_size=20_000, min_frequency=1, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(words(), trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    vocab: dict[str, int] = {}
    for piece in [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), START, END]:
        vocab.setdefault(piece, len(vocab))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END,
        "model_max_length": length, "add_prefix_space": False, "errors": "replace", "do_lower_case": True,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def config(tokenizer: CLIPTokenizer, hidden: int = HIDDEN, layers: int = 3, heads: int = 4) -> CLIPTextConfig:
    """A small CLIP text configuration. eos_token_id must not be 2: that switches transformers to an old pooling."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden if hidden < 256 else hidden,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=int(tokenizer.model_max_length),
        projection_dim=HIDDEN, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, hidden_act="gelu",
    )  # fmt: skip


class TextEncoders(nn.Module):
    """SDXL's two text encoders with their (equal) tokenizer."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.one = CLIPTextModel(config(tokenizer))
        self.two = CLIPTextModelWithProjection(config(tokenizer))

    def ids(self, prompts: list[str]) -> Tensor:
        """Token ids [n, LENGTH]."""
        return self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """SDXL's context [n, L, 128] (both penultimate layers side by side) and pooled vector [n, 64]."""
        a = self.one(ids, output_hidden_states=True)
        b = self.two(ids, output_hidden_states=True)
        return torch.cat([a.hidden_states[-2], b.hidden_states[-2]], -1), b.text_embeds


def random_captions(n: int, seed: int, blank: float = 0.06) -> tuple[list[str], Tensor]:
    """Captions without pictures and what they say [n, attributes]; ``blank``: the share of empty ones."""
    rng = random.Random(seed)
    labels = sample_nuisances(n, seed, style_shares=(0.5, 0.125, 0.125, 0.125, 0.125)).labels
    pairs = [random_caption(labels, i, rng, drop=0.2) for i in range(n)]
    nothing = {name: CLASSES[name] - 1 for name in QUERIES}
    pairs = [(blank_caption(rng), nothing) if rng.random() < blank else p for p in pairs]
    return [p[0] for p in pairs], meanings([p[1] for p in pairs])


def pretrain(encoders: TextEncoders, root: Path, minutes: float, *, device: str = "cpu", batch: int = 128) -> float:
    """Teach the encoders to let attributes be read; returns the share of attributes read right on fresh captions."""
    torch.manual_seed(21)
    read = nn.ModuleDict(
        {"context": nn.Linear(2 * HIDDEN, sum(CLASSES.values())), "pooled": nn.Linear(HIDDEN, sum(CLASSES.values()))}
    )
    encoders.train().to(device)
    read.to(device)

    def accuracy() -> dict[str, float]:
        prompts, goal = random_captions(512, 999)
        return {"right": float(_scores(encoders, read, encoders.ids(prompts).to(device), goal.to(device))[1])}

    loop = Loop("text", root, {"encoders": encoders, "read": read}, minutes, rate=2e-3, muon=False, decay=0.8,
                averaging=0.99, on_save=accuracy, save_every=60)  # fmt: skip
    while loop.going:
        prompts, goal = random_captions(batch, 10_000 + loop.steps)
        loss, right = _scores(encoders, read, encoders.ids(prompts).to(device), goal.to(device))
        loop.update(loss, batch, right=float(right))
    loop.finish()
    encoders.eval().requires_grad_(False)
    tie_same(encoders.tokenizer, encoders.one, encoders.two)
    return accuracy()["right"]


@torch.no_grad()
def tie_same(tokenizer: CLIPTokenizer, *encoders: CLIPTextModel | CLIPTextModelWithProjection) -> None:
    """Give every word of :data:`~idgen.training.captions.SAME` the embedding of the word that it stands for."""
    for encoder in encoders:
        table = encoder.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        for word, others in SAME.items():
            for other in others.split():
                table.weight[_id(tokenizer, other)] = table.weight[_id(tokenizer, word)]


def _id(tokenizer: CLIPTokenizer, word: str) -> int:
    (number,) = tokenizer(word, add_special_tokens=False).input_ids
    return int(number)


def _scores(encoders: TextEncoders, read: nn.ModuleDict, ids: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy summed over attributes, and the share read right, from the mean context and the pooled vector."""
    context, pooled = encoders(ids)
    loss = context.new_zeros(())
    right = []
    for scores in (read["context"](context.mean(1)), read["pooled"](pooled)):
        for k, part in enumerate(scores.split([CLASSES[name] for name in QUERIES], 1)):
            loss = loss + F.cross_entropy(part, goal[:, k])
            right.append((part.argmax(1) == goal[:, k]).float().mean())
    return loss, torch.stack(right).mean()
