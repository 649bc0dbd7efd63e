"""Reads a base model from the single-file layout of the original repositories (``ldm``, ``sgm``, ``open_clip``).

Why not diffusers' ``from_single_file``: it tells SDXL's two text encoders apart by their width alone, and leaves a
tensor that the file lacks without data, which only shows later, as an error inside torch. Here every tensor of a model
is asked for by its name in the file and with the size that it needs; what else the file holds is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from idgen.errors import BadWeights

Rows = tuple[int, int]
"""Which part of a file's tensor is meant: (i, n) is the i-th of n equal blocks of rows."""
Rule = Callable[[str], tuple[str, Rows]]
"""From a tensor's name in the model to its name in the file."""

ALL: Rows = (0, 1)
UNET_PARTS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_PARTS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}


def family_of(keys: set[str]) -> str | None:
    """``sdxl`` or ``sd15``, by the text encoders' keys; None for anything else, such as SD2 or SDXL's refiner."""
    if any(key.startswith("conditioner.embedders.1.model.") for key in keys):
        return "sdxl"
    return "sd15" if any(key.startswith("cond_stage_model.transformer.") for key in keys) else None


def read_models(path: Path, folder: Path, family: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """The UNet, VAE and text encoders in ``path``, by their names in a pipeline.

    Args:
        folder: a diffusers folder of the same architecture; only its ``config.json`` files are read.
        family: ``sdxl`` or ``sd15``.
        device: each tensor goes there in ``dtype`` as it is read; no model is whole on the CPU on its way.
    Raises:
        BadWeights: a tensor is absent or has another size; the message names it as the file does.
        OSError, ValueError: the folder or the file cannot be read.
    """
    import diffusers
    import transformers
    from accelerate import init_empty_weights
    from safetensors import safe_open

    encoders: dict[str, Any] = {"text_encoder": transformers.CLIPTextModel}
    if family == "sdxl":
        encoders["text_encoder_2"] = transformers.CLIPTextModelWithProjection
    models: dict[str, tuple[Any, Rule]] = {}
    with safe_open(path, "pt") as file:
        with init_empty_weights():  # their tensors come from the file: no time and memory for random ones
            config = diffusers.UNet2DConditionModel.load_config(str(folder), subfolder="unet")
            models["unet"] = diffusers.UNet2DConditionModel.from_config(config), _unet_rule(config)
            config = diffusers.AutoencoderKL.load_config(str(folder), subfolder="vae")
            models["vae"] = diffusers.AutoencoderKL.from_config(config), _vae_rule(config)
            for name, cls in encoders.items():
                rule = _open_clip_rule if name == "text_encoder_2" else _clip_rule(family, set(file.keys()))
                models[name] = cls(cls.config_class.from_pretrained(str(folder), subfolder=name)), rule
        try:
            return {name: _fill(model, rule, file, dtype, device) for name, (model, rule) in models.items()}
        except LookupError as error:
            cure = f"Is it a base of another kind than {folder}, cut short, or meant for inpainting?"
            raise BadWeights(f"{path} is not a usable base model: {error.args[0]}. {cure}") from None


def _fill(model: Any, rule: Rule, file: Any, dtype: torch.dtype, device: str) -> Any:
    """Give a model the file's tensors, one by one."""
    keys, state = set(file.keys()), {}
    for name, place in model.state_dict().items():
        key, (part, parts) = rule(name)
        if key not in keys:
            raise LookupError(f"it has no {key!r}")
        size, want = list(file.get_slice(key).get_shape()), list(place.shape)
        want[0] *= parts
        turned = key.endswith(".text_projection")  # open_clip multiplies by it from the right
        if turned:
            want.reverse()
        if _plain(size) != _plain(want):
            raise LookupError(f"its {key!r} has the size {size} instead of {want}")
        value = file.get_tensor(key).chunk(parts)[part]
        state[name] = (value.T if turned else value).reshape(place.shape).to(device, dtype).contiguous()
    model.load_state_dict(state, assign=True)
    return model.eval()


def _plain(size: list[int]) -> list[int]:
    """A size, that of a linear layer for a 1x1 convolution: the same base is shared with either for its attention."""
    return size[:2] if len(size) == 4 and size[2:] == [1, 1] else size


def _unet_rule(config: dict[str, Any]) -> Rule:
    """diffusers numbers blocks and their layers; the original counts all layers through, samplers included."""
    layers, up_types = int(config["layers_per_block"]), list(config["up_block_types"])

    def rule(name: str) -> tuple[str, Rows]:
        if ".resnets." in name:
            name = _replace(name, RESNET)
        if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
            side, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            if kind == "downsamplers":
                module, rest = f"input_blocks.{(block + 1) * (layers + 1)}.0", rest.replace("conv.", "op.")
            elif kind == "upsamplers":
                # In the sequence of the block's last layer: resnet, attention (where there is one), upsampler.
                place = 2 if "CrossAttn" in up_types[block] else 1
                module = f"output_blocks.{block * (layers + 1) + layers}.{place}"
            else:
                count = block * (layers + 1) + layer
                head = f"input_blocks.{count + 1}" if side == "down" else f"output_blocks.{count}"
                module = f"{head}.{0 if kind == 'resnets' else 1}"
            name = f"{module}.{rest}"
        return "model.diffusion_model." + _replace(name, UNET_PARTS), ALL

    return rule


def _vae_rule(config: dict[str, Any]) -> Rule:
    """The original numbers the decoder's blocks by their scale, diffusers in the order of their use."""
    last = len(config["up_block_types"]) - 1

    def rule(name: str) -> tuple[str, Rows]:
        name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
        name = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{last - int(found[1])}.", name)
        name = re.sub(r"((?:down|up)\.\d+)\.resnets\.", r"\1.block.", name)
        return "first_stage_model." + _replace(name, VAE_PARTS), ALL

    return rule


def _clip_rule(family: str, keys: set[str]) -> Rule:
    """transformers' own names; its versions differ in whether the level ``text_model`` is there, as files do."""
    prefix = "conditioner.embedders.0.transformer." if family == "sdxl" else "cond_stage_model.transformer."
    level = "" if prefix + "embeddings.token_embedding.weight" in keys else "text_model."
    return lambda name: (prefix + level + name.removeprefix("text_model."), ALL)


def _open_clip_rule(name: str) -> tuple[str, Rows]:
    """open_clip keeps the queries', keys' and values' weights in one matrix, one below the other."""
    name, rows = _replace(name.removeprefix("text_model."), OPEN_CLIP), ALL
    if found := re.search(r"\.([qkv])_proj\.", name):
        name, rows = name.replace(found[0], ".in_proj_"), ("qkv".index(found[1]), 3)
    return "conditioner.embedders.1.model." + name, rows


def _replace(name: str, parts: dict[str, str]) -> str:
    """Replace dotted parts of a name, whole steps only."""
    for new, old in parts.items():
        name = re.sub(rf"(^|(?<=\.)){re.escape(new)}(?=\.|$)", old, name)
    return name
