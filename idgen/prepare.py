"""Levers that change resident models rather than one run: memory format, number format, autoencoder, compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from idgen.backbone import Backbone
from idgen.errors import BadRequest
from idgen.few_step import use_few_step
from idgen.speed import Levers


def prepare(backbone: Backbone, networks: list[Any], levers: Levers) -> None:
    """Apply the load-time levers to the backbone and to a pipeline's own networks (ControlNets, a UNet of its own).

    Raises:
        BadRequest, WeightsMissing: a lever needs something that is not here; names what.
    """
    from diffusers import UNet2DConditionModel

    levers = levers.upon(backbone.levers)
    models = [backbone.unet, *(network for network in networks if network is not backbone.unet)]
    if levers.tiny_vae is not None:
        use_tiny_vae(backbone, levers.tiny_vae)
    if levers.few_step is not None:  # before anything wraps, packs or compiles the layers that it is added to
        for model in models:
            if isinstance(model, UNet2DConditionModel):
                use_few_step(backbone, model, levers.few_step)
    on_gpu = backbone.device.type == "cuda"
    if levers.channels_last if levers.channels_last is not None else on_gpu and backbone.offload is None:
        for model in [*models, backbone.vae]:
            model.to(memory_format=torch.channels_last)
    if levers.quantise is not None:
        for model in models:
            quantise(model, levers.quantise)
    if levers.compile is not None:
        for model in models:
            compile_model(model, levers.compile)
    backbone.levers = levers


def networks_of(methods: list[Any]) -> list[Any]:
    """The networks that methods bring beside the backbone's own."""
    found = [getattr(method, name, None) for method in methods for name in ("controlnet", "unet")]
    return [network for network in found if isinstance(network, nn.Module)]


def compile_model(model: Any, kind: str, backend: str = "inductor") -> None:
    """torch.compile, once for a model.

    ``"regional"`` compiles the transformer block, of which SDXL has 70: one compilation serves all. ``"full"`` compiles
    the network with CUDA graphs. Compiled code is kept in torch's cache folder (``TORCHINDUCTOR_CACHE_DIR``), so the
    next process starts warm. Shapes are static: another picture size is another compilation, kept beside the first.
    """
    if getattr(model, "_idgen_compiled", None) == kind:
        return
    if getattr(model, "_idgen_compiled", None) is not None:
        raise BadRequest(f"this backbone is already compiled ({model._idgen_compiled}); load another one.", "compile")
    # One entry for each picture size and each set of active streams; the default of 8 would silently go back to eager.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if kind == "full":
        graphs = backend == "inductor" and next(model.parameters()).is_cuda
        model.compile(backend=backend, mode="reduce-overhead" if graphs else None, dynamic=False)
    else:
        from diffusers.models.attention import BasicTransformerBlock

        for block in model.modules():
            if type(block) is BasicTransformerBlock:
                block.compile(backend=backend, dynamic=False)
    model._idgen_compiled = kind


def quantise(model: Any, kind: str) -> None:
    """Linear layers in 8 bits through torchao, once for a model.

    ``"int8"``: weights and activations in int8, dynamically scaled. ``"fp8"``: float8 e4m3 with one scale a row.
    Layers narrower than 256 stay as they are: their products are too small to gain.

    Raises:
        BadRequest: torchao is not installed, or the GPU has no float8.
    """
    if getattr(model, "_idgen_quantised", None) == kind:
        return
    if getattr(model, "_idgen_quantised", None) is not None:
        raise BadRequest(f"this backbone is already quantised ({model._idgen_quantised}); load another.", "quantise")
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError:
        raise BadRequest(f"quantise={kind!r} needs torchao: pip install torchao", "quantise") from None
    device = next(model.parameters()).device
    if kind == "fp8" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise BadRequest("quantise='fp8' needs a GPU of the Ada or Hopper generation; use 'int8'.", "quantise")
    config = (
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        if kind == "fp8"
        else Int8DynamicActivationInt8WeightConfig()
    )
    quantize_(model, config, filter_fn=_worth_quantising)
    model._idgen_quantised = kind


def _worth_quantising(layer: nn.Module, name: str) -> bool:
    """The products over picture tokens; embeddings of time and text are one row, and feed every block."""
    if type(layer) is not nn.Linear or min(layer.weight.shape) < 256:
        return False
    return not any(part in name for part in ("time_emb", "time_embedding", "add_embedding", ".to_k", ".to_v")) or (
        ".attn1." in name
    )


def use_tiny_vae(backbone: Backbone, source: str) -> None:
    """Replace the backbone's autoencoder by a tiny one (TAESD).

    Raises:
        WeightsMissing, BadWeights: it is not here, or is none.
    """
    from diffusers import AutoencoderTiny

    from idgen.errors import BadWeights
    from idgen.locate import locate

    if backbone.levers.tiny_vae == source:
        return
    folder = Path(source) if Path(source).is_dir() else locate(source)
    try:
        vae = AutoencoderTiny.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise BadWeights(f"{folder} is no tiny autoencoder ({str(error).splitlines()[0]}).") from None
    backbone.pipe.vae = vae.to(backbone.device, backbone.dtype).eval().requires_grad_(False)
