"""Face tokens: an identity embedding takes the place of a word in the prompt (Arc2Face, arXiv:2403.11641, section 3.2).

The CLIP text encoder is run on "photo of a id person", with the token embedding of "id" replaced by the identity
embedding padded with zeros; the whole last hidden state then is the prompt embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from idgen.adapters.checkpoints import read_tensors
from idgen.errors import BadWeights, WeightsMissing

TEMPLATE = "photo of a id person"
PLACEHOLDER = "id"


def load_text_encoder(folder: Path | str) -> Any:
    """Load a CLIP text encoder from ``config.json`` and ``pytorch_model.bin`` or ``model.safetensors``, in float32.

    Raises:
        WeightsMissing: a file is not there. BadWeights: keys or shapes do not fit the config.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise WeightsMissing(f"there is no text encoder in {folder}: config.json is missing.")
    files = [folder / name for name in ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")]
    file = next((f for f in files if f.is_file()), files[-1])
    tensors = read_tensors(file)
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(folder))
    wanted = model.state_dict()
    # transformers 5 dropped the 'text_model.' level from the module tree; public files have it.
    nested = any(key.startswith("text_model.") for key in wanted)
    state = {}
    for key, tensor in tensors.items():
        if key.endswith("position_ids"):
            continue
        bare = key.removeprefix("text_model.")
        state[f"text_model.{bare}" if nested else bare] = tensor.float()
    for key, tensor in wanted.items():
        if key.endswith("position_ids"):
            continue
        if key not in state:
            raise BadWeights(f"{file} is not the text encoder its config describes: it lacks {key!r}.")
        if state[key].shape != tensor.shape:
            raise BadWeights(f"{file}: {key!r} has shape {tuple(state[key].shape)}, expected {tuple(tensor.shape)}.")
    model.load_state_dict(state, strict=False)
    return model.float().eval().requires_grad_(False)


def placeholder_id(tokenizer: Any) -> int:
    """The token id of the placeholder word.

    Raises:
        BadWeights: the tokenizer splits the word, so that no single embedding can take its place.
    """
    ids = tokenizer(PLACEHOLDER, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise BadWeights(f"this tokenizer splits {PLACEHOLDER!r} into {len(ids)} tokens; face tokens need it whole.")
    return ids[0]


def encode_faces(encoder: Any, tokenizer: Any, embeddings: Tensor) -> Tensor:
    """Prompt embeddings that say "this person".

    Args:
        embeddings: (B, 512), normalised by the caller.
    Returns:
        (B, T, H), T the tokenizer's length, H the encoder's hidden size (at least 512).
    """
    table = encoder.get_input_embeddings()
    width = table.weight.shape[1]
    if width < embeddings.shape[-1]:
        raise BadWeights(
            f"the face text encoder is {width} wide, too narrow for an embedding of {embeddings.shape[-1]}."
        )
    ids = tokenizer(TEMPLATE, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
    ids = torch.tensor([ids], device=table.weight.device).expand(len(embeddings), -1)
    padded = F.pad(embeddings.to(table.weight), (0, width - embeddings.shape[-1]))
    hit = (ids == placeholder_id(tokenizer)).unsqueeze(-1)

    def substitute(_: Any, __: Any, output: Tensor) -> Tensor:
        return torch.where(hit, padded.unsqueeze(1), output)

    handle = table.register_forward_hook(substitute)
    try:
        return encoder(ids)[0]
    finally:
        handle.remove()


def encode_text(encoder: Any, tokenizer: Any, text: str) -> Tensor:
    """Plain text through the same encoder, (1, T, H); the negative prompt takes this way."""
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
    return encoder(torch.tensor([ids], device=encoder.get_input_embeddings().weight.device))[0]
