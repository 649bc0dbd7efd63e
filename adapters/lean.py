"""A model's blocks without their detours: the same arithmetic in fewer calls, while a request runs.

diffusers' blocks serve a hundred configurations; at batch 1 a GPU waits for the Python between its kernels. For the
configuration of SDXL and SD1.5 the two blocks below say all there is: pre-norm residual attention and GEGLU
(``BasicTransformerBlock``), and the residual convolution block of DDPM (``ResnetBlock2D``). A block of any other kind,
or one that holds a peft layer, a hook or a quantised weight, is left as it is. torch.compile needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idgen.adapters.linear import linear
from idgen.adapters.processor import is_plain


class LeanBlocks:
    """A context manager over a UNet or ControlNet; on exit the model is as it was. No weight is touched."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._changed: list[nn.Module] = []

    def __enter__(self) -> LeanBlocks:
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        if hasattr(self.model, "_hf_hook"):
            return self  # offloaded: its weights are elsewhere until it is called, so nothing can be read now
        resnets = []
        for module in self.model.modules():
            if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
                continue
            if type(module) is BasicTransformerBlock and _is_usual_transformer(module):
                self._replace(module, _transformer(module))
            elif type(module) is ResnetBlock2D and _is_usual_resnet(module):
                resnets.append(module)
            elif type(module) is Transformer2DModel:
                for layer in (module.proj_in, module.proj_out):
                    if type(layer) is nn.Linear and is_plain(layer):
                        self._replace(layer, partial(linear, weight=layer.weight, bias=layer.bias))
        if resnets:
            times = TimeProjections([resnet.time_emb_proj for resnet in resnets])
            for number, resnet in enumerate(resnets):
                self._replace(resnet, _resnet(resnet, times, number))
        return self

    def _replace(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        module.forward = forward  # on the instance, over the class's
        self._changed.append(module)

    def __exit__(self, *_: object) -> None:
        for module in self._changed:
            del module.forward
        self._changed = []


class TimeProjections:
    """The projections of the time embedding of all residual blocks, as one matrix product a step."""

    def __init__(self, layers: list[Any]) -> None:
        self.weight = torch.cat([layer.weight for layer in layers])
        self.bias = torch.cat([layer.bias for layer in layers])
        self.widths = [layer.out_features for layer in layers]
        self.embedding: Tensor | None = None
        self.projected: tuple[Tensor, ...] = ()

    def __call__(self, embedding: Tensor, number: int) -> Tensor:
        """(B, E) -> (B, C, 1, 1) of block ``number``."""
        if self.embedding is not embedding:
            self.embedding = embedding
            rows = F.linear(F.silu(embedding), self.weight, self.bias)
            self.projected = rows[:, :, None, None].split(self.widths, dim=1)
        return self.projected[number]


def _is_usual_transformer(block: Any) -> bool:
    from diffusers.models.activations import GEGLU

    if block.norm_type != "layer_norm" or block.pos_embed is not None or block._chunk_size is not None:
        return False
    if block.only_cross_attention or block.attn2 is None or block.attn1 is None or len(block.ff.net) != 3:
        return False
    parts = (block.norm1, block.norm2, block.norm3, block.ff.net[2])
    gate = block.ff.net[0]
    return type(gate) is GEGLU and is_plain(gate.proj) and all(is_plain(part) for part in parts)


def _transformer(block: Any) -> Callable[..., Tensor]:
    attn1, attn2, gate, last = block.attn1, block.attn2, block.ff.net[0].proj, block.ff.net[2]
    norms = [(norm.normalized_shape, norm.weight, norm.bias, norm.eps) for norm in (block.norm1, block.norm2)]
    norm3 = (block.norm3.normalized_shape, block.norm3.weight, block.norm3.bias, block.norm3.eps)

    def forward(hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        """(B, L, C) -> (B, L, C)"""
        x = hidden_states
        x = attn1.forward(F.layer_norm(x, *norms[0])) + x
        x = attn2.forward(F.layer_norm(x, *norms[1]), encoder_hidden_states) + x
        value, open_by = linear(F.layer_norm(x, *norm3), gate.weight, gate.bias).chunk(2, dim=-1)
        return linear(value * F.gelu(open_by), last.weight, last.bias) + x

    return forward


def _is_usual_resnet(block: Any) -> bool:
    if block.time_embedding_norm != "default" or block.skip_time_act or block.output_scale_factor != 1.0:
        return False
    if block.upsample is not None or block.downsample is not None or not isinstance(block.nonlinearity, nn.SiLU):
        return False
    parts = [block.norm1, block.conv1, block.time_emb_proj, block.norm2, block.conv2]
    parts += [] if block.conv_shortcut is None else [block.conv_shortcut]
    return all(is_plain(part) for part in parts)


def _resnet(block: Any, times: TimeProjections, number: int) -> Callable[..., Tensor]:
    norm1, conv1, norm2, conv2, shortcut = block.norm1, block.conv1, block.norm2, block.conv2, block.conv_shortcut

    def forward(input_tensor: Tensor, temb: Tensor, *_: Any, **__: Any) -> Tensor:
        """(B, c, h, w) -> (B, C, h, w)"""
        x = F.silu(F.group_norm(input_tensor, norm1.num_groups, norm1.weight, norm1.bias, norm1.eps), inplace=True)
        x = conv1(x).add_(times(temb, number))
        x = F.silu(F.group_norm(x, norm2.num_groups, norm2.weight, norm2.bias, norm2.eps), inplace=True)
        x = conv2(x)
        return x.add_(input_tensor if shortcut is None else shortcut(input_tensor))

    return forward
