"""Captions as people would write them: a random part of the phrases, in any order, with synonyms; and what they say."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .heads import ATTRIBUTES, caption_parts

SYNONYMS: dict[str, tuple[str, ...]] = {
    "a photo of a person": ("photo of a person", "a portrait of a person", "portrait photo", "a person"),
    "a pencil sketch of a person": ("a pencil drawing of a person", "pencil sketch", "a sketch of a person"),
    "a marble statue of a person": ("marble statue", "a statue of a person", "a stone sculpture of a person"),
    "a comic drawing of a person": ("a cartoon of a person", "comic style", "a comic book portrait"),
    "an oil painting of a person": ("oil painting", "a painting of a person", "a painted portrait"),
    "with a neutral face": ("neutral", "serious", "with a neutral expression"),
    "smiling": ("with a smile", "happy", "a smiling person"),
    "laughing": ("with a big laugh", "a laughing person"),
    "looking surprised": ("surprised", "with a surprised face"),
    "looking sad": ("sad", "with a sad face"),
    "looking angry": ("angry", "with an angry face"),
    "with closed eyes": ("eyes closed", "sleeping"),
    "facing the camera": ("from the front", "frontal view"),
    "looking left": ("turned to the left", "facing left"),
    "looking right": ("turned to the right", "facing right"),
    "looking up": ("head up",),
    "looking down": ("head down",),
    "with tilted head": ("tilted head", "head tilted"),
    "wearing glasses": ("with glasses", "glasses"),
    "wearing a hat": ("with a hat", "hat"),
    "soft light": ("soft studio light",),
    "light from above": ("top light",),
}
"""Other ways to say a phrase; `wearing a red shirt` and its like follow patterns instead."""

SAME: dict[str, str] = {
    "person": "man woman boy girl child guy lady human",
    "photo": "photograph",
    "background": "backdrop wall",
    "shirt": "tshirt tee sweater jumper hoodie blouse dress coat jacket suit",
    "hat": "cap beanie",
    "glasses": "spectacles eyeglasses sunglasses",
    "wearing": "wears",
    "gray": "grey silver",
    "red": "crimson scarlet",
    "blue": "navy azure",
    "purple": "violet lilac",
    "yellow": "golden",
    "smiling": "grinning beaming",
    "smile": "grin",
    "happy": "cheerful joyful",
    "laughing": "giggling",
    "surprised": "astonished amazed shocked",
    "sad": "unhappy",
    "angry": "furious annoyed mad",
    "sleeping": "asleep",
}
"""Word of our captions -> words that people may write for it. No caption has those: the text encoders read them as the
word itself (see :func:`~idgen.training.text.tie_same`)."""

QUERIES = (*ATTRIBUTES,)
CLASSES = {name: len(values) + 1 for name, values in ATTRIBUTES.items()}
"""Classes per attribute of :func:`meaning`; the last one is "not said"."""


def _vary(phrase: str, rng: random.Random) -> str:
    if phrase in SYNONYMS and rng.random() < 0.35:
        return rng.choice(SYNONYMS[phrase])
    if phrase.startswith("wearing a ") and rng.random() < 0.3:
        return phrase.replace("wearing a ", rng.choice(("with a ", "in a ", "")))
    if phrase.endswith(" background") and rng.random() < 0.3:
        return rng.choice(("on a ", "in front of a ")) + phrase
    return phrase


def filler(rng: random.Random) -> str:
    """A few words that say nothing about our pictures."""
    return " ".join(rng.sample(_EXTRA.split(), rng.randint(1, 4)))


def blank_caption(rng: random.Random) -> str:
    """What stands for "no caption": mostly nothing, at times the usual negative prompt or idle words."""
    chance = rng.random()
    return "" if chance < 0.6 else NEGATIVE if chance < 0.85 else filler(rng)


def random_caption(
    labels: Mapping[str, Tensor], i: int, rng: random.Random, drop: float = 0.12
) -> tuple[str, dict[str, int]]:
    """A caption for row ``i`` and what it says: attribute name -> class, or the last class for "not said"."""
    head, parts = caption_parts(dict(labels), i)
    said = {name: phrase for name, phrase in parts.items() if rng.random() >= drop}
    phrases = [_vary(p, rng) for p in said.values()]
    if rng.random() < 0.5:
        rng.shuffle(phrases)
    if rng.random() < 0.15:
        phrases.insert(rng.randint(0, len(phrases)), filler(rng))
    style_said = rng.random() > 0.1 or int(labels["style"][i]) != 0
    text = (", " if rng.random() < 0.6 else " ").join([_vary(head, rng), *phrases] if style_said else phrases)
    meaning = {name: len(values) for name, values in ATTRIBUTES.items()}
    for name in ("expression", "pose", "light", "background", "shirt", "glasses", "hat"):
        if name in said:
            meaning[name] = int(labels[name][i])
    if "hat" in said and said["hat"] != "wearing a hat":
        meaning["hat_colour"] = int(labels["hat_colour"][i])
    if style_said:
        meaning["style"] = int(labels["style"][i])
    return text, meaning


def meanings(rows: Sequence[dict[str, int]]) -> Tensor:
    """Meanings as a matrix [n, attributes] of class indices."""
    return torch.tensor([[row[name] for name in QUERIES] for row in rows])


def words() -> list[str]:
    """Every word of every caption, and some that people like to write, each to become a single token."""
    from .heads.nuisances import EXPRESSION_WORDS, LIGHT_WORDS, POSE_WORDS, STYLE_WORDS

    phrases = [*SYNONYMS, *(p for group in SYNONYMS.values() for p in group)]
    phrases += [*EXPRESSION_WORDS, *LIGHT_WORDS, *POSE_WORDS, *STYLE_WORDS, *ATTRIBUTES["background"]]
    phrases += [
        "wearing with in on a shirt hat glasses background in front of a , . id the an and of by",
        *SAME.values(),
    ]
    phrases += [_EXTRA]
    return sorted({w for p in phrases for w in p.replace(",", " , ").split()})


NEGATIVE = "monochrome, lowres, bad anatomy, worst quality, low quality"
"""The negative prompt that the IP-Adapter authors use and idgen takes over."""

_EXTRA = """best quality high low worst monochrome lowres bad anatomy blurry old young people
friend king queen astronaut knight pirate wizard doctor teacher painter watercolor ink style portrait picture image art
studio outdoor forest beach city street night day morning sunset snow rain summer winter sky sea mountain garden space
tie scarf crown helmet beard hair long short curly bald blonde brown dark bright warm
cold big small close up wide detailed realistic cinematic vintage modern digital render face eyes mouth nose looking
standing sitting holding book flower cat dog coffee guitar dramatic gentle calm proud tired excited scared beautiful"""
