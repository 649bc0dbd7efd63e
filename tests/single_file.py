"""Turns a diffusers folder into one file of the layout of the original repositories, as model sites share them.

Written from those repositories' modules (``ldm``, ``sgm``, ``open_clip``) by replacing names one after the other, not
by the rules of :mod:`idgen.single_file`: a mistake in either shows as a difference.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def write(folder: Path, path: Path, state: dict[str, Tensor] | None = None) -> Path:
    """Write ``folder`` (or the tensors ``state``, changed from it) as the single file ``path``."""
    state = convert(folder) if state is None else state
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return path


@lru_cache
def convert(folder: Path) -> dict[str, Tensor]:
    """All tensors of a diffusers folder under their original names. Read once: change a copy only."""
    xl = (folder / "text_encoder_2").is_dir()
    clip = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    state = unet(*part(folder, "unet")) | vae(*part(folder, "vae"))
    encoder, _ = part(folder, "text_encoder")
    state |= {clip + key: value for key, value in encoder.items()}
    # Files in the wild carry this buffer, and the noise schedule; a loader has to pass over both.
    state[clip + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    if xl:
        state |= open_clip(part(folder, "text_encoder_2")[0])
    return state


def unet(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Blocks are numbered through: ``input_blocks`` down, ``middle_block``, ``output_blocks`` up."""
    names = {"conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2."}
    names |= {f"time_embedding.linear_{i + 1}.": f"time_embed.{2 * i}." for i in range(2)}
    names |= {f"add_embedding.linear_{i + 1}.": f"label_emb.0.{2 * i}." for i in range(2)}
    names |= {"mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1."}
    names["mid_block.resnets.1."] = "middle_block.2."
    position = 1
    for block in range(len(config["down_block_types"])):
        for layer in range(config["layers_per_block"]):
            names[f"down_blocks.{block}.resnets.{layer}."] = f"input_blocks.{position}.0."
            names[f"down_blocks.{block}.attentions.{layer}."] = f"input_blocks.{position}.1."
            position += 1
        if block < len(config["down_block_types"]) - 1:
            names[f"down_blocks.{block}.downsamplers.0.conv."] = f"input_blocks.{position}.0.op."
            position += 1
    position = 0
    for block, kind in enumerate(config["up_block_types"]):
        for layer in range(config["layers_per_block"] + 1):
            names[f"up_blocks.{block}.resnets.{layer}."] = f"output_blocks.{position}.0."
            names[f"up_blocks.{block}.attentions.{layer}."] = f"output_blocks.{position}.1."
            position += 1
        # The upsampler follows in the last layer's sequence, after the attention where there is one.
        place = 2 if kind.startswith("CrossAttn") else 1
        names[f"up_blocks.{block}.upsamplers.0.conv."] = f"output_blocks.{position - 1}.{place}.conv."
    out = {}
    for key, value in state.items():
        old = next(name for name in names if key.startswith(name))
        rest = key[len(old) :]
        if "resnets" in old:
            module, end = rest.rsplit(".", 1)
            rest = f"{RESNET[module]}.{end}"
        out["model.diffusion_model." + names[old] + rest] = value
    return out


def vae(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The decoder's blocks count from the picture's side; its attention is four 1x1 convolutions."""
    last = len(config["up_block_types"]) - 1
    out = {}
    for key, value in state.items():
        for i in range(last + 1):
            key = key.replace(f"down_blocks.{i}.resnets.", f"down.{i}.block.")
            key = key.replace(f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample.")
            key = key.replace(f"up_blocks.{i}.resnets.", f"up.{last - i}.block.")
            key = key.replace(f"up_blocks.{i}.upsamplers.0.", f"up.{last - i}.upsample.")
        for i in range(2):
            key = key.replace(f"mid_block.resnets.{i}.", f"mid.block_{i + 1}.")
        if "mid_block.attentions.0." in key:
            key = key.replace("mid_block.attentions.0.", "mid.attn_1.")
            for new, old in VAE_ATTENTION.items():
                key = key.replace(f".{new}.", f".{old}.")
            if value.ndim == 2:
                value = value[:, :, None, None]
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        out["first_stage_model." + key] = value
    return out


def open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values in one matrix, and a projection that multiplies from the right."""
    out = {"logit_scale": torch.tensor(4.6)}
    for key, value in state.items():
        for new, old in OPEN_CLIP.items():
            key = key.replace(new, old)
        if key.endswith("text_projection.weight"):
            out["text_projection"] = value.T
        elif ".q_proj." in key:
            of = lambda letter, key=key: state[_original(key).replace("q_proj", f"{letter}_proj")]  # noqa: E731
            out[key.replace("q_proj.", "in_proj_")] = torch.cat([of("q"), of("k"), of("v")])
        elif ".k_proj." not in key and ".v_proj." not in key:
            out[key] = value
    return {"conditioner.embedders.1.model." + key: value for key, value in out.items()}


def _original(key: str) -> str:
    for new, old in OPEN_CLIP.items():
        key = key.replace(old, new)
    return key


def part(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights = next((folder / name).glob("*.safetensors"))
    return load_file(weights), json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
