"""Prompts to text tokens: nothing is cut silently, ``(word:1.2)`` weights work, repeated prompts are encoded once."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from idgen.backbone import Backbone
from idgen.errors import BadRequest

_WEIGHT = re.compile(r"\(([^()]+):\s*([0-9]*\.?[0-9]+)\s*\)")


class Encoded(NamedTuple):
    """One prompt: ``tokens`` (1, T, D), T a multiple of the encoder's length; ``pooled`` (1, P) or None."""

    tokens: Tensor
    pooled: Tensor | None


def split_weights(prompt: str) -> list[tuple[str, float]]:
    """Split ``"a (red:1.3) hat"`` into ``[("a ", 1.0), ("red", 1.3), (" hat", 1.0)]``.

    Only parentheses that end in ``:number`` carry a weight (the notation of the field's user interfaces); all others
    are ordinary text.

    Raises:
        BadRequest: a weight is above 3 (the picture would burn).
    """
    parts: list[tuple[str, float]] = []
    position = 0
    for match in _WEIGHT.finditer(prompt):
        weight = float(match[2])
        if not math.isfinite(weight) or weight > 3:
            raise BadRequest(f"the weight {match[2]} of {match[1]!r} is above 3; use 0 to 3.", "prompt")
        if match.start() > position:
            parts.append((prompt[position : match.start()], 1.0))
        parts.append((match[1], weight))
        position = match.end()
    if position < len(prompt) or not parts:
        parts.append((prompt[position:], 1.0))
    return parts


@torch.no_grad()
def encode_prompt(backbone: Backbone, prompt: str) -> Encoded:
    """Encode one prompt, or return it from the backbone's cache.

    A prompt that fits the encoder and has no weights takes exactly diffusers' way. Longer ones are encoded in chunks of
    the encoder's length, and weights are applied to the embeddings, both by compel.
    """

    def make() -> Encoded:
        parts = split_weights(prompt)
        plain = len(parts) == 1 and parts[0][1] == 1.0 and fits(backbone, prompt)
        return _encode_plain(backbone, prompt) if plain else _encode_weighted(backbone, parts)

    return backbone.text_cache.get(prompt, make)


def encode_negative(backbone: Backbone, prompt: str | None) -> Encoded:
    """The negative half. ``None`` means none: zeros where the base asks for them (SDXL), else the empty prompt."""
    if prompt is None and backbone.pipe.config.get("force_zeros_for_empty_prompt"):
        empty = encode_prompt(backbone, "")
        return Encoded(torch.zeros_like(empty.tokens), None if empty.pooled is None else torch.zeros_like(empty.pooled))
    return encode_prompt(backbone, prompt or "")


def pad_together(items: list[Encoded], backbone: Backbone) -> Tensor:
    """Stack prompts of different numbers of chunks: shorter ones are filled with the empty prompt. (B, T, D)."""
    longest = max(item.tokens.shape[1] for item in items)
    rows = []
    for item in items:
        row = item.tokens
        while row.shape[1] < longest:
            row = torch.cat([row, encode_prompt(backbone, "").tokens], dim=1)
        rows.append(row)
    return torch.cat(rows)


def _encoders(backbone: Backbone) -> list[tuple[Any, Any]]:
    pipe = backbone.pipe
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    if backbone.family == "sdxl":
        pairs.append((pipe.tokenizer_2, pipe.text_encoder_2))
    return pairs


def fits(backbone: Backbone, prompt: str) -> bool:
    """Whether a prompt needs no second chunk in any of the backbone's encoders."""
    converted = _convert(backbone, prompt)
    with _without_false_alarms():
        return all(
            len(tokenizer(text)["input_ids"]) <= tokenizer.model_max_length
            for (tokenizer, _), text in zip(_encoders(backbone), converted)
        )


@contextmanager
def _without_false_alarms() -> Iterator[None]:
    """transformers warns that a text is longer than the encoder, which does not know that it will be cut in chunks."""
    log = logging.getLogger("transformers.tokenization_utils_base")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _convert(backbone: Backbone, prompt: str) -> list[str]:
    """Multi-vector textual-inversion tokens are spelt out, as diffusers' pipelines do."""
    with _without_false_alarms():
        return [backbone.pipe.maybe_convert_prompt(prompt, tokenizer) for tokenizer, _ in _encoders(backbone)]


def _encode_plain(backbone: Backbone, prompt: str) -> Encoded:
    if backbone.family == "sdxl":
        tokens, _, pooled, _ = backbone.pipe.encode_prompt(
            prompt, device=backbone.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Encoded(tokens.to(backbone.dtype), pooled.to(backbone.dtype))
    tokens, _ = backbone.pipe.encode_prompt(
        prompt, device=backbone.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return Encoded(tokens.to(backbone.dtype), None)


def _encode_weighted(backbone: Backbone, parts: list[tuple[str, float]]) -> Encoded:
    from compel import DiffusersTextualInversionManager
    from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode

    xl = backbone.family == "sdxl"
    kind = (
        ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        if xl
        else ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
    )
    texts, weights = [text for text, _ in parts], [weight for _, weight in parts]
    halves = []
    for tokenizer, encoder in _encoders(backbone):
        provider = EmbeddingsProvider(
            tokenizer,
            encoder,
            textual_inversion_manager=DiffusersTextualInversionManager(backbone.pipe),
            dtype_for_device_getter=lambda _: backbone.dtype,
            truncate=False,
            returned_embeddings_type=kind,
            split_long_text_mode=SplitLongTextMode.PHRASES,
            device=str(backbone.device),
        )
        with _without_false_alarms():
            half = provider.get_embeddings_for_weighted_prompt_fragments([texts], [weights], device=backbone.device)
        halves.append(half)
    longest = max(half.shape[1] for half in halves)
    halves = [_repeat_to(half, longest) for half in halves]
    tokens = torch.cat(halves, dim=-1).to(backbone.dtype)
    # The pooled vector has no weights and no chunks: it is that of the text's beginning, as in every SDXL interface.
    return Encoded(tokens, _pooled(backbone, "".join(texts)) if xl else None)


def _pooled(backbone: Backbone, text: str) -> Tensor:
    """The pooled vector (1, P) of a text's beginning, as diffusers computes it.

    Not by its ``encode_prompt``, which would warn that the text is cut, and write all of it into the log.
    """
    pipe = backbone.pipe
    tokenizer = pipe.tokenizer_2
    text = _convert(backbone, text)[1]
    length = tokenizer.model_max_length
    ids = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    pooled: Tensor = pipe.text_encoder_2(ids.to(backbone.device), output_hidden_states=True)[0]
    return pooled.to(backbone.dtype)


def _repeat_to(tokens: Tensor, length: int) -> Tensor:
    """Two tokenizers may need different numbers of chunks; the shorter repeats its last."""
    while tokens.shape[1] < length:
        tokens = torch.cat([tokens, tokens[:, -(length - tokens.shape[1]) :]], dim=1)
    return tokens
