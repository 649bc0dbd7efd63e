"""Models with random weights for speed measurements: the time of a step does not depend on the values of the weights.

Nothing is downloaded. The full-size configurations are those of the public repositories' ``config.json`` files; the
small ones keep SDXL's blocks, and with them its number of operations, and shrink every width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from idgen.adapters.attention import StreamWeights, attention_layers
from idgen.backbone import Backbone


@dataclass(frozen=True)
class Size:
    """One model size and the picture it is measured at."""

    name: str
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    """transformer layers in each block; 0: a block without attention"""
    head: int
    """width of an attention head"""
    context: int
    """cross-attention width D"""
    pooled: int
    """width of the pooled text, 0 for SD1.5 (no added conditioning)"""
    latent: int
    """side of the square latent"""
    control: tuple[int, ...]
    """channels of the control-image embedding"""
    identity_tokens: int = 16
    """InstantID's; a plain IP-Adapter has 4"""
    groups: int = 32
    time: int = 256
    """width of each of the six embedded time ids (``addition_time_embed_dim``)"""

    @property
    def pixels(self) -> int:
        """Side of the picture."""
        return 8 * self.latent


SIZES = {
    size.name: size
    for size in (
        # Test size: no more than runs in a second.
        Size("nano", (16, 16, 32), (0, 1, 1), 16, 48, 32, 8, (8, 8, 8, 8), groups=8, time=8),
        Size("nano15", (16, 16, 32), (1, 1, 0), 2, 48, 0, 8, (8, 8, 8, 8), 4, groups=8),
        # The two CPU sizes: the same number of operations as SDXL, all of it overhead; and some arithmetic as well.
        Size("overhead", (32, 64, 128), (0, 2, 10), 16, 208, 128, 8, (8, 16, 32, 64), time=32),
        Size("small", (64, 128, 256), (0, 2, 10), 32, 416, 256, 32, (16, 32, 96, 256), time=64),
        # stabilityai/stable-diffusion-xl-base-1.0, unet/config.json; InstantX/InstantID, ControlNetModel/config.json.
        Size("sdxl", (320, 640, 1280), (0, 2, 10), 64, 2048, 1280, 128, (16, 32, 96, 256)),
        # stable-diffusion-v1-5: 8 heads in each block, so the width of a head grows; 40 stands for the first block.
        Size("sd15", (320, 640, 1280, 1280), (1, 1, 1, 0), 40, 768, 0, 64, (16, 32, 96, 256), 4),
    )
}

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
"""SDXL's scheduler_config.json."""


def unet_config(size: Size) -> dict[str, Any]:
    """Arguments of ``UNet2DConditionModel``."""
    down = tuple("CrossAttnDownBlock2D" if n else "DownBlock2D" for n in size.layers)
    up = tuple("CrossAttnUpBlock2D" if n else "UpBlock2D" for n in reversed(size.layers))
    heads = tuple(max(1, c // size.head) for c in size.channels) if size.pooled else 8
    return {
        **_shared(size),
        "sample_size": size.latent,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": down,
        "up_block_types": up,
        "attention_head_dim": heads,
    }


def controlnet_config(size: Size) -> dict[str, Any]:
    """Arguments of ``ControlNetModel``: the encoder half of the UNet."""
    config = unet_config(size)
    for name in ("sample_size", "out_channels", "up_block_types"):
        config.pop(name)
    return {**config, "conditioning_embedding_out_channels": size.control}


def _shared(size: Size) -> dict[str, Any]:
    config: dict[str, Any] = {
        "block_out_channels": size.channels,
        "layers_per_block": 2,
        "cross_attention_dim": size.context,
        "transformer_layers_per_block": tuple(max(1, n) for n in size.layers),
        "norm_num_groups": size.groups,
    }
    if size.pooled:
        config |= {
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": size.time,
            "projection_class_embeddings_input_dim": size.pooled + 6 * size.time,
        }
    return config


def build(cls: Any, config: dict[str, Any], device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model with random weights, made on ``device``. Zero convolutions get values, so that nothing is trivially 0."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = cls(**config)
    finally:
        torch.set_default_dtype(before)
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.is_meta and not weight.any():
            nn.init.normal_(weight, std=0.02)
    return model.eval().requires_grad_(False)


def backbone(size: Size, device: str = "cpu", dtype: str = "float32", vae: bool = False) -> Backbone:
    """A backbone without text encoders: the bench hands prompt embeddings in."""
    import diffusers

    number = getattr(torch, dtype)
    unet = build(diffusers.UNet2DConditionModel, unet_config(size), device, number)
    scheduler = diffusers.EulerDiscreteScheduler(**SCHEDULER)
    parts: dict[str, Any] = {"unet": unet, "scheduler": scheduler, "text_encoder": None, "tokenizer": None}
    parts["vae"] = build(diffusers.AutoencoderKL, _vae_config(size, tiny=not vae), device, number)
    cls: Any
    if size.pooled:
        cls, family = diffusers.StableDiffusionXLPipeline, "sdxl"
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    else:
        cls, family = diffusers.StableDiffusionPipeline, "sd15"
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return Backbone(pipe, family, f"random {size.name}", device, dtype, None)


def _vae_config(size: Size, tiny: bool) -> dict[str, Any]:
    """The public SDXL VAE, or a stub of the same scale factor where no picture is decoded."""
    widths = (8, 8, 8, 8) if tiny else (128, 256, 512, 512)
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1 if tiny else 2,
        "norm_num_groups": 4 if tiny else 32,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
        "force_upcast": False,
        "sample_size": size.pixels,
    }


def controlnet(size: Size, device: str = "cpu", dtype: str = "float32") -> Any:
    """An IdentityNet."""
    import diffusers

    return build(diffusers.ControlNetModel, controlnet_config(size), device, getattr(torch, dtype), seed=1)


def stream_weights(model: nn.Module, seed: int = 2) -> StreamWeights:
    """Random key and value projections for every cross-attention layer."""
    generator = torch.Generator().manual_seed(seed)
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    for number, (_, layer) in enumerate(attention_layers(model)):
        if layer.is_cross_attention:
            weight = layer.to_k.weight
            for table in (keys, values):
                noise = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
                table[number] = noise.to(weight.device, weight.dtype)
    return StreamWeights(keys, values)


def ip_adapter_state(weights: StreamWeights, size: Size, tokens: int = 4, clip: int = 64) -> dict[str, Any]:
    """The same weights as a public plain IP-Adapter checkpoint, with a random projection ``clip`` -> tokens."""
    generator = torch.Generator().manual_seed(3)
    like = next(iter(weights.key.values()))
    rand = lambda *shape: torch.randn(*shape, generator=generator).to(like.device, like.dtype)  # noqa: E731
    projection = {
        "proj.weight": rand(tokens * size.context, clip) / clip**0.5,
        "proj.bias": rand(tokens * size.context) * 0.1,
        "norm.weight": torch.ones(size.context).to(like.device, like.dtype),
        "norm.bias": torch.zeros(size.context).to(like.device, like.dtype),
    }
    layers = {f"{i}.to_k_ip.weight": w for i, w in weights.key.items()}
    layers |= {f"{i}.to_v_ip.weight": w for i, w in weights.value.items()}
    return {"image_proj": projection, "ip_adapter": layers}
