"""The resident base model: UNet, VAE, text encoders, scheduler. One backbone serves every pipeline."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idgen.base_loading import FAMILIES, load_pipe
from idgen.caches import TensorCache
from idgen.errors import BadRequest, BadWeights, IdgenError, OutOfMemory
from idgen.speed import Levers
from idgen.user_weights import UserWeights, explain_loading

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(device: str = "auto") -> tuple[str, str]:
    """The device to run on and why.

    Raises:
        BadRequest: an explicitly named device is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device != "auto":
        kind = device.split(":")[0]
        if kind not in ("cpu", "cuda", "mps"):
            raise BadRequest(f"device {device!r} is unknown; choose auto, cpu, cuda, cuda:N or mps.", "device")
        if (kind == "cuda" and not cuda) or (kind == "mps" and not mps):
            cure = (
                "install a CUDA build of torch and the NVIDIA driver" if kind == "cuda" else "use macOS 12.3 or later"
            )
            raise BadRequest(
                f"device {device!r} was asked for, but torch sees none; {cure}, or use --device cpu.", "device"
            )
        return device, "asked for"
    if cuda:
        return "cuda", f"torch sees {torch.cuda.get_device_name(0)}"
    if mps:
        return "mps", "torch sees an Apple GPU"
    return "cpu", "torch sees no GPU"


def choose_dtype(device: str, dtype: str = "auto") -> tuple[str, str]:
    """The number format to compute in (a key of ``DTYPES``) and why.

    Raises:
        BadRequest: the format is unknown.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise BadRequest(f"dtype {dtype!r} is unknown; choose auto, {', '.join(DTYPES)}.", "dtype")
        return dtype, "asked for"
    if device.startswith("cuda"):
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return "bfloat16", "this GPU computes in bfloat16, and SDXL's VAE overflows in float16"
        return "float16", "this GPU has no bfloat16; the VAE is run in float32"
    if device == "mps":
        return "float16", "halves the memory on Apple GPUs; the VAE is run in float32, which avoids black images"
    return "float32", "exact, and the fastest format that every CPU has"


class Backbone:
    """A base model on a device. Use :meth:`load`; reads like a diffusers pipeline, which it holds as ``pipe``."""

    def __init__(self, pipe: Any, family: str, source: str, device: str, dtype: str, offload: str | None) -> None:
        self.pipe = pipe
        self.family = family
        """``sdxl`` or ``sd15``"""
        self.source = source
        self.device = torch.device(device)
        self.dtype = DTYPES[dtype]
        self.offload = offload
        self.lock = threading.RLock()
        """Held while the sampler runs: one UNet serves one run at a time."""
        self.overlap = _may_overlap(pipe.vae, self.device, offload)
        """Whether pictures may be decoded while the next are denoised: on CUDA, unless offloading moves the models to
        and fro, or tiles and slices say that memory is scarce. A CPU has nothing to gain: one run keeps it busy."""
        self._vae_lock = threading.Lock()
        self._stream: Any = None
        self.levers = Levers()
        """The levers that changed its models (:func:`idgen.prepare.prepare`), for all pipelines that stand on it."""
        self.text_cache = TensorCache()
        """Encoded prompts by prompt; emptied when a LoRA or an embedding may have changed the text encoders."""
        self.preview_map: Tensor | None = None
        self._loras: dict[str, UserWeights] = {}
        self._embeddings: list[UserWeights] = []

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        offload: str | None = None,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        config: str | Path | None = None,
        variant: str | None = None,
    ) -> Backbone:
        """Load SDXL or SD1.5.

        Args:
            source: a diffusers folder, a hub id, or a single ``.safetensors`` file (the layout of the original
                repositories, as shared on model sites).
            offload: ``None``, ``"model"`` (whole modules wait on the CPU) or ``"sequential"`` (layer by layer; slow,
                smallest). Both need a GPU.
            vae_slicing, vae_tiling: decode image by image, or tile by tile, for small cards.
            config: for a single file, a diffusers folder of the same family, for its architecture, tokenizers and
                scheduler; ``None`` takes the public base of the store, else that base's description from the hub.
        Raises:
            WeightsMissing, BadWeights, BadRequest: nothing there; not a base model; a setting is out of its bounds.
        """
        device, _ = choose_device(device)
        dtype, _ = choose_dtype(device, dtype)
        if offload not in (None, "model", "sequential"):
            raise BadRequest(f"offload is {offload!r}; choose 'model', 'sequential' or nothing.", "offload")
        if offload and device == "cpu":
            raise BadRequest("offload moves models between GPU and CPU; without a GPU leave it off.", "offload")
        # Offloading wants the weights on the CPU; otherwise they go where they are used as they are read.
        pipe = load_pipe(source, DTYPES[dtype], config, variant, "cpu" if offload else device)
        family = FAMILIES.get(type(pipe).__name__)
        if family is None:
            raise BadWeights(f"{source} holds a {type(pipe).__name__}; idgen needs an SDXL or SD1.5 base model.")
        pipe.set_progress_bar_config(disable=True)
        for module in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
            if module is not None:
                module.eval().requires_grad_(False)
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            pipe.to(device)
        if dtype == "float16" and getattr(pipe.vae.config, "force_upcast", True) is not False:
            pipe.vae.to(torch.float32)
        if vae_slicing:
            pipe.vae.enable_slicing()
        if vae_tiling:
            pipe.vae.enable_tiling()
        return cls(pipe, family, str(source), device, dtype, offload)

    @property
    def unet(self) -> Any:
        """The UNet."""
        return self.pipe.unet

    @property
    def vae(self) -> Any:
        """The autoencoder (AutoencoderKL or AutoencoderTiny)."""
        return self.pipe.vae

    @property
    def scheduler(self) -> Any:
        """The base's own scheduler; the sampler works on fresh copies."""
        return self.pipe.scheduler

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, 4 for the public bases."""
        return int(self.unet.config.in_channels)

    @property
    def vae_factor(self) -> int:
        """Pixels a latent cell covers along each side, 8 for the public bases."""
        return int(self.pipe.vae_scale_factor)

    @property
    def default_size(self) -> int:
        """Side of the square that the base was trained on, in pixels."""
        return int(self.unet.config.sample_size) * self.vae_factor

    def load_lora(self, source: str | Path, scale: float = 1.0, name: str | None = None) -> None:
        """Load a user's LoRA through diffusers. It stays active beside every identity adapter.

        Raises:
            WeightsMissing: it is neither here nor to be had from the hub. BadWeights: it is no LoRA for this base.
        """
        name = name or f"user_{len(self.loras())}"
        path = Path(source)
        with explain_loading(source, "a LoRA", self.family):
            if path.is_file():
                self.pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
            else:
                self.pipe.load_lora_weights(str(source), adapter_name=name)
        self._loras[name] = UserWeights.of("lora", source, scale)
        self.pipe.set_adapters(list(self._loras), [lora.scale for lora in self._loras.values()])
        self.text_cache.clear()

    def unload_loras(self) -> None:
        """Take all user LoRAs out again."""
        self.pipe.unload_lora_weights()
        self._loras.clear()
        self.text_cache.clear()

    def loras(self) -> list[str]:
        """Names of the loaded user LoRAs."""
        return list(self._loras)

    def user_weights(self) -> list[UserWeights]:
        """The user's LoRAs and embeddings, in the order in which each kind was loaded."""
        return [*self._loras.values(), *self._embeddings]

    def load_embedding(self, source: str | Path, token: str | None = None) -> None:
        """Load a textual-inversion embedding through diffusers.

        Raises:
            WeightsMissing: it is neither here nor to be had from the hub. BadWeights: it is no embedding for this base.
        """
        with explain_loading(source, "an embedding", self.family):
            self.pipe.load_textual_inversion(str(source), token=token)
        self._embeddings.append(UserWeights.of("embedding", source, token=token))
        self.text_cache.clear()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor, generators: list[torch.Generator] | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in 0..1 to scaled latents (B, c, h, w).

        An AutoencoderKL posterior is sampled with one generator an image, or its mode is taken without generators.
        Several generators for one image give as many latents.
        """
        encoded = self.vae.encode((pixels * 2 - 1).to(self.device, self.vae.dtype))
        if hasattr(encoded, "latents"):
            latents = self._scale(encoded.latents.to(self.dtype))
            return latents if generators is None else latents.expand(len(generators), -1, -1, -1)
        posterior = encoded.latent_dist
        if generators is None:
            return self._scale(posterior.mode().to(self.dtype))
        noise = torch.cat(
            [torch.randn((1, *posterior.mean.shape[1:]), generator=g, dtype=torch.float32) for g in generators]
        )
        latents = posterior.mean + posterior.std * noise.to(posterior.mean)
        return self._scale(latents.to(self.dtype))

    def decode(self, latents: Tensor, ready: Any = None) -> Tensor:
        """Scaled latents (B, c, h, w) to pixels (B, 3, H, W) float32 in 0..1, on the CPU.

        Args:
            ready: the CUDA event after which the latents are computed, when another thread computes them; where
                decoding may overlap with denoising it is then awaited, and nothing that was queued later.
        Raises:
            OutOfMemory: names what to lower.
        """
        image = self._decode_beside(latents, ready) if self.overlap else None
        if image is None:
            with self.lock, explain_out_of_memory():
                image = self._decode(latents)
        if image.isnan().any():
            raise IdgenError("the VAE overflowed (the image would be black): use dtype bfloat16 or float32.")
        return image

    def _decode_beside(self, latents: Tensor, ready: Any) -> Tensor | None:
        """Decode without the sampler's lock, on CUDA on a stream of its own; ``None`` where memory is too small for
        both at once."""
        with self._vae_lock:
            try:
                if self.device.type != "cuda":
                    return self._decode(latents)
                self._stream = self._stream or torch.cuda.Stream(self.device)
                if ready is None:
                    self._stream.wait_stream(torch.cuda.current_stream(self.device))
                else:
                    self._stream.wait_event(ready)
                latents.record_stream(self._stream)  # its memory must not be given away while this stream reads it
                with torch.cuda.stream(self._stream):
                    return self._decode(latents)
            except torch.OutOfMemoryError:
                return None

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        image = self.vae.decode(self._unscale(latents).to(self.vae.dtype)).sample
        return (image.float() / 2 + 0.5).clamp(0, 1).cpu()

    def _scale(self, latents: Tensor) -> Tensor:
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * self.vae.config.scaling_factor

    def _unscale(self, latents: Tensor) -> Tensor:
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return latents / self.vae.config.scaling_factor + shift


def _may_overlap(vae: Any, device: torch.device, offload: str | None) -> bool:
    scarce = getattr(vae, "use_tiling", False) or getattr(vae, "use_slicing", False)
    return device.type == "cuda" and offload is None and not scarce


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn torch's out-of-memory error into one that names what to lower."""
    try:
        yield
    except torch.OutOfMemoryError:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory(
            "the GPU ran out of memory: lower n, width or height, or load with offload='model' and vae_tiling=True."
        ) from None
