"""The two backbones of mini: an SDXL and a Stable Diffusion 1.5 in miniature, and their noise schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn

from .autoencoder import LATENT_CHANNELS
from .text import HIDDEN, TextEncoders

CONTEXT = 2 * HIDDEN
"""Width of a context token: both text encoders side by side."""
CHANNELS = (64, 128, 128)
SIZE = 128
GUIDANCE = 3.0


def scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR (Lin et al., 2023): with epsilon the captions were not learned at our
    budgets.
    """
    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True,
        steps_offset=1,  # of no effect with "trailing", but diffusers warns about 0
    )  # fmt: skip


def build_unet(
    context: int = CONTEXT, *, xl: bool = True, channels: tuple[int, ...] = CHANNELS
) -> UNet2DConditionModel:
    """An untrained UNet over 16 x 16 latents. Attention at full resolution would cost a third, so it starts at 8 x
    8.
    """
    sdxl = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": HIDDEN + 6 * 8,
    }  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=channels,
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=context,
        attention_head_dim=tuple(c // 32 for c in channels), use_linear_projection=True, norm_num_groups=16,
        **(sdxl if xl else {}),
    )  # fmt: skip
    unet.conv_out.weight.data.mul_(0.1)
    return unet


def time_ids(n: int, device: torch.device | str = "cpu") -> Tensor:
    """SDXL's size conditioning for 128 x 128: [n, 6]."""
    return torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], dtype=torch.float32, device=device).expand(n, 6)


def save_xl(
    folder: Path, unet: UNet2DConditionModel, vae: AutoencoderTiny, text: TextEncoders, shard: str = "14MB"
) -> None:
    """Write a folder that ``StableDiffusionXLPipeline.from_pretrained`` reads, fp16, no file over ``shard``."""
    parts: dict[str, Any] = {
        "vae": vae, "text_encoder": text.one, "text_encoder_2": text.two, "tokenizer": text.tokenizer,
        "tokenizer_2": text.tokenizer, "unet": unet, "scheduler": scheduler(),
    }  # fmt: skip
    pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False, force_zeros_for_empty_prompt=False)
    _save_half(pipe, folder, shard)


def save_sd15(
    folder: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderTiny,
    encoder: nn.Module,
    tokenizer: object,
    shard: str = "14MB",
) -> None:
    """Write a folder that ``StableDiffusionPipeline.from_pretrained`` reads, fp16, no file over ``shard``."""
    parts: dict[str, Any] = {
        "vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler(),
        "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip
    _save_half(StableDiffusionPipeline(**parts, requires_safety_checker=False), folder, shard)


def _save_half(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline, folder: Path, shard: str) -> None:
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            part.to(torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True, max_shard_size=shard)
    for name in ("text_encoder", "text_encoder_2"):
        if (folder / name).exists():
            load_as_float(folder / name)


def load_as_float(folder: Path) -> None:
    """Let transformers load a half-precision model in float32, as diffusers does with its parts, unless told otherwise.

    It takes the data type from config.json; without this a plain ``from_pretrained`` of the whole folder mixes two
    types.
    """
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["dtype"] = "float32"
    path.write_text(json.dumps(settings, indent=2) + "\n")
