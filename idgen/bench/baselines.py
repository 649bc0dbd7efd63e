"""What idgen is measured against: public APIs, written plainly, nothing cached, nothing slowed down on purpose.

Both baselines run on a UNet of their own with the same weights as idgen's, because diffusers' IP-Adapter stays in the
UNet it was loaded into.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idgen.adapters.attention import StreamWeights, attention_layers
from idgen.backbone import Backbone
from idgen.bench.inputs import Inputs
from idgen.bench.models import ip_adapter_state


class StockIPAdapter:
    """``pipe.load_ip_adapter`` and ``pipe(...)`` of a stock diffusers pipeline, down to the final latents."""

    def __init__(self, backbone: Backbone, weights: StreamWeights, inputs: Inputs) -> None:
        self.inputs = inputs
        self.pipe: Any = type(backbone.pipe)(
            **{**backbone.pipe.components, "unet": copy.deepcopy(backbone.unet)},
            **({} if backbone.family == "sdxl" else {"requires_safety_checker": False}),
        )
        self.pipe.set_progress_bar_config(disable=True)
        state = ip_adapter_state(weights, inputs.size)
        self.pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
        self.graphs = False

    def compile(self) -> None:
        """With the public torch.compile and channels_last."""
        self.graphs = compile_publicly(self.pipe.unet)

    @torch.no_grad()
    def __call__(self, steps: int, guidance: float = 5.0) -> Tensor:
        """(B, c, h, w)"""
        inputs, regions = self.inputs, self.inputs.regions
        self.pipe.set_ip_adapter_scale([[inputs.scale] * len(regions)] if regions is not None else inputs.scale)
        extra: dict[str, Any] = {}
        if inputs.pooled is not None:
            extra |= {
                "pooled_prompt_embeds": inputs.pooled,
                "negative_pooled_prompt_embeds": inputs.negative_pooled,
            }
        if self.graphs:
            extra["callback_on_step_end"] = _next_step
        if regions is not None:
            extra["cross_attention_kwargs"] = {"ip_adapter_masks": [regions.transpose(0, 1)]}
        guided = guidance > 1
        images = inputs.images[None] if inputs.images.ndim == 2 else inputs.images
        return self.pipe(
            prompt_embeds=inputs.text,
            negative_prompt_embeds=inputs.negative,
            ip_adapter_image_embeds=[torch.cat([images * 0, images]) if guided else images],
            latents=inputs.noise,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=inputs.size.pixels,
            width=inputs.size.pixels,
            output_type="latent",
            **extra,
        ).images


def compile_publicly(*networks: Any) -> bool:
    """``torch.compile`` as diffusers' documentation advises; returns whether CUDA graphs replay the networks."""
    graphs = next(networks[0].parameters()).is_cuda
    for network in networks:
        network.to(memory_format=torch.channels_last)
        network.compile(mode="reduce-overhead" if graphs else None)
    return graphs


def _next_step(*_: Any) -> dict[str, Any]:
    """Outputs of the step's CUDA graphs may be written over: everything was taken from them."""
    torch.compiler.cudagraph_mark_step_begin()
    return {}


class OriginalProcessor(nn.Module):
    """Cross-attention as InstantID's repository writes it (``ip_adapter/attention_processor.py``): the identity tokens
    are the last of the context, and their keys and values are projected anew at every step."""

    def __init__(self, key: Tensor, value: Tensor, tokens: int, scale: float) -> None:
        super().__init__()
        self.key, self.value = nn.Parameter(key, False), nn.Parameter(value, False)
        self.tokens, self.scale = tokens, scale

    def forward(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """(B, L, C) -> (B, L, C)"""
        text, identity = encoder_hidden_states[:, : -self.tokens], encoder_hidden_states[:, -self.tokens :]
        heads = lambda x: x.view(x.shape[0], -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)  # noqa: E731
        q = heads(attn.to_q(hidden_states))
        out = F.scaled_dot_product_attention(q, heads(attn.to_k(text)), heads(attn.to_v(text)))
        k, v = heads(F.linear(identity, self.key)), heads(F.linear(identity, self.value))
        out = out + self.scale * F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).reshape(hidden_states.shape)
        return attn.to_out[1](attn.to_out[0](out))


class PlainInstantID:
    """A straightforward InstantID loop: ControlNet, UNet, guidance, scheduler, at every step."""

    def __init__(self, backbone: Backbone, controlnet: Any, weights: StreamWeights, inputs: Inputs) -> None:
        self.inputs = inputs
        self.scheduler = backbone.scheduler
        self.unet = copy.deepcopy(backbone.unet)
        self.controlnet = copy.deepcopy(controlnet)
        tokens = inputs.tokens.shape[1]
        for number, (_, attn) in enumerate(attention_layers(self.unet)):
            if attn.is_cross_attention:
                attn.processor = OriginalProcessor(weights.key[number], weights.value[number], tokens, inputs.scale)
        self.graphs = False

    def compile(self) -> None:
        """With the public torch.compile and channels_last."""
        self.graphs = compile_publicly(self.unet, self.controlnet)

    @torch.no_grad()
    def __call__(self, steps: int, guidance: float = 5.0) -> Tensor:
        """(B, c, h, w)"""
        inputs = self.inputs
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=inputs.noise.device)
        guided = guidance > 1
        both = lambda negative, positive: torch.cat([negative, positive]) if guided else positive  # noqa: E731
        identity = both(inputs.no_tokens, inputs.tokens)
        context = torch.cat([both(inputs.negative, inputs.text), identity], dim=1)
        ids = inputs.time_ids.to(inputs.noise.dtype)
        added = {"text_embeds": both(inputs.negative_pooled, inputs.pooled), "time_ids": both(ids, ids)}
        control = both(inputs.control, inputs.control)
        x = inputs.noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            if self.graphs:
                _next_step()
            model_input = scheduler.scale_model_input(torch.cat([x] * 2) if guided else x, t)
            down, mid = self.controlnet(
                model_input,
                t,
                encoder_hidden_states=identity,
                controlnet_cond=control,
                conditioning_scale=inputs.structure_scale,
                added_cond_kwargs=added,
                return_dict=False,
            )
            eps = self.unet(
                model_input,
                t,
                encoder_hidden_states=context,
                added_cond_kwargs=added,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
                return_dict=False,
            )[0]
            if guided:
                unconditional, conditional = eps.chunk(2)
                eps = unconditional + guidance * (conditional - unconditional)
            x = scheduler.step(eps, t, x, return_dict=False)[0]
        return x
