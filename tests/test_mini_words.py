"""Words that mean the same to people mean the same to mini, which was only taught one of each."""

from __future__ import annotations

import random

import pytest
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import idgen
from idgen.training.captions import SAME, random_caption, words
from idgen.training.heads import sample_nuisances
from idgen.training.text import TextEncoders, tie_same, write_tokenizer
from tests.conftest import REPOSITORY

MINI = REPOSITORY / "weights" / "mini"
PAIRS = [(word, other) for word, others in SAME.items() for other in others.split()]
ENCODERS = [
    ("mini-xl", "tokenizer", "text_encoder", CLIPTextModel),
    ("mini-xl", "tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection),
    ("mini-sd15", "tokenizer", "text_encoder", CLIPTextModel),
]


@pytest.mark.parametrize(("base", "tokenizer", "encoder", "cls"), ENCODERS)
def test_the_shipped_encoders_read_each_word_and_its_other_words_alike(base, tokenizer, encoder, cls) -> None:
    tokens = CLIPTokenizer.from_pretrained(MINI / base / tokenizer)
    table = cls.from_pretrained(MINI / base / encoder).get_input_embeddings().weight
    assert len(table) == len(tokens)
    for word, other in PAIRS:
        (one,), (two,) = (tokens(each, add_special_tokens=False).input_ids for each in (word, other))
        assert one != two and table[one].equal(table[two]), other


def test_a_freshly_taught_encoder_does_too_and_no_caption_has_the_other_words(tmp_path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    encoders = TextEncoders(tokenizer)
    tie_same(tokenizer, encoders.one, encoders.two)
    plain, other = (encoders(encoders.ids([text])) for text in ("photo, gray hat", "photograph, grey beanie"))
    assert all(one.equal(two) for one, two in zip(plain, other))
    assert not plain[0].equal(encoders(encoders.ids(["photo, gray shirt"]))[0])
    assert {other for _, other in PAIRS} <= set(words())
    labels = sample_nuisances(50, 3).labels
    said = {
        word for i in range(50) for word in random_caption(labels, i, random.Random(i))[0].replace(",", " ").split()
    }
    assert not said & {other for _, other in PAIRS}


def test_a_prompt_in_other_words_gives_the_same_portrait() -> None:
    pipeline = idgen.load("ip-adapter-faceid-plusv2", base="mini")
    photo = REPOSITORY / "examples" / "ada" / "1.png"
    prompts = (
        "a photo of a person, smiling, wearing glasses, wearing a blue hat, wearing a red shirt, gray background",
        "a photograph of a woman, grinning, wearing spectacles, wearing a navy cap, wearing a crimson dress, grey wall",
        "a photo of a person, smiling, wearing glasses, wearing a blue hat, wearing a red shirt, green background",
    )
    one, same, different = (pipeline.generate(photo, prompt, seed=3, steps=4)[0].image for prompt in prompts)
    assert one.tobytes() == same.tobytes() != different.tobytes()
