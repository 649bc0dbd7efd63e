"""Writing the model set: every part in its public format, half precision, no file over 15 MB."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from safetensors.torch import save_file
from torch import Tensor, nn

from . import arc2face, instantid
from .artefacts import load_autoencoder, load_generator, load_text
from .backbone import load_as_float, save_sd15, save_xl
from .face_image import FaceImage, save_image_encoder
from .generator import Generator
from .loop import load_averaged
from .run import Run

LARGEST = 15_000_000
"""Bytes of the largest file that may be written."""
BUDGET = 60_000_000
"""Bytes of the whole set."""


def export(run: Run, out: Path) -> dict[str, int]:
    """Write everything that the run folder holds a trained state of into ``out``; returns file sizes in bytes.

    Parts that are not trained are left out with a line that says so. Raises ValueError when a file or the set is too
    big.
    """
    run = Run(run.root, "cpu")
    out.mkdir(parents=True, exist_ok=True)
    model, words, vae = load_generator(run), load_text(run), load_autoencoder(run)
    _fresh(out / "mini-xl")
    save_xl(out / "mini-xl", model.unet, vae, words)
    keys = {f"ip_adapter.{k}": v for k, v in model.keys.tensors().items()}
    project = _prefixed(model.projector, "image_proj.")
    save_half({**project, **keys}, out / "ip-adapter-faceid_mini-xl.safetensors")
    # The files above hold half-precision copies; from here on full precision is needed again.
    model, words, vae = load_generator(run), load_text(run), load_autoencoder(run)
    if run.has("face_image.pt"):
        face = FaceImage()
        load_averaged(run.root / "face_image.pt", {"model": face})
        refine = _prefixed(face.perceiver, "image_proj.perceiver_resampler.")
        save_half({**project, **refine, **keys}, out / "ip-adapter-faceid-plusv2_mini-xl.safetensors")
        save_image_encoder(face.encoder, _fresh(out / "image_encoder"))
    else:
        print("no face_image.pt: PlusV2 is left out")
    if run.has("identity_net.pt"):
        _export_instantid(run, model, keys, _fresh(out / "instantid"))
    else:
        print("no identity_net.pt: InstantID is left out")
    if run.has("arc2face.pt"):
        _export_arc2face(run, model, out)
    else:
        print("no arc2face.pt: mini-sd15 and Arc2Face are left out")
    # The recogniser that the generator was trained on must go with it: never keep older face models.
    if all(run.has(name) for name in ("recogniser.pt", "scorer.pt", "detector.pt")):
        from .export import export_all

        export_all(run.root, out / "faces")
    for folder in out.glob("mini-*/tokenizer*"):
        # transformers 5 writes tokenizer.json alone; version 4 and others look for CLIP's own two files.
        for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
            shutil.copyfile(run.root / "tokenizer" / name, folder / name)
    return check_sizes(out)


def _export_instantid(run: Run, model: Generator, keys: dict[str, Tensor], folder: Path) -> None:
    resampler = instantid.build_resampler()
    resampler.load_state_dict(torch.load(run.root / "resampler_final.pt", weights_only=True))
    save_half({**_prefixed(resampler, "image_proj."), **keys}, folder / "ip-adapter.safetensors")
    net: ControlNetModel = instantid.build_identity_net(model)
    load_averaged(run.root / "identity_net.pt", {"net": net})
    net.half().save_pretrained(folder / "ControlNetModel", max_shard_size="14MB")


def _export_arc2face(run: Run, model: Generator, out: Path) -> None:
    words, vae = load_text(run), load_autoencoder(run)
    encoder, faces = arc2face.build_encoder(words.tokenizer), arc2face.FaceTokens(words.tokenizer)
    encoder.load_state_dict(torch.load(run.root / "sd15_encoders_final.pt", weights_only=True)[0])
    unet = arc2face.from_xl(model, words).requires_grad_(True)
    load_averaged(run.root / "arc2face.pt", {"unet": unet, "faces": faces})
    save_sd15(_fresh(out / "mini-sd15"), unet, vae, encoder, words.tokenizer)
    folder = _fresh(out / "arc2face")
    faces.encoder.half().save_pretrained(folder / "encoder")
    load_as_float(folder / "encoder")
    # The UNet is mini-sd15's own: the Arc2Face pipeline takes the base's when its folder has none.


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _prefixed(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + k: v.detach() for k, v in module.state_dict().items()}


def save_half(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file in fp16. Raises ValueError for values that fp16 cannot hold."""
    half = {k: v.detach().cpu().to(torch.float16).contiguous() for k, v in tensors.items()}
    broken = [k for k, v in half.items() if not torch.isfinite(v).all()]
    if broken:
        raise ValueError(f"not finite in half precision: {', '.join(broken[:5])}")
    save_file(half, path, metadata={"format": "pt"})


def check_sizes(out: Path) -> dict[str, int]:
    """Sizes of all files below ``out``; raises ValueError over the limits."""
    sizes = {str(p.relative_to(out)): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
    large = [name for name, size in sizes.items() if size > LARGEST]
    if large or sum(sizes.values()) > BUDGET:
        raise ValueError(f"too big: {large or ''} {sum(sizes.values()) / 1e6:.1f} MB in all")
    print(json.dumps({k: f"{v / 1e6:.2f} MB" for k, v in sizes.items() if v > 1e5}, indent=1))
    print(f"{sum(sizes.values()) / 1e6:.1f} MB in all")
    return sizes


__all__ = ["check_sizes", "export", "save_half"]
