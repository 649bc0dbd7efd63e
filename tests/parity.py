"""Parity packs: recordings of the original implementations, replayed through idgen's public API.

A pack root holds ``bases/``, ``inputs/`` and one folder a method with ``checkpoint/`` and ``cases/``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import idgen
from idgen.pipeline import Pipeline
from idgen.request import Request
from idgen.sampler import Step


@dataclass(frozen=True)
class Case:
    root: Path
    pack: str
    name: str

    @property
    def id(self) -> str:
        return f"{self.pack}/{self.name}"

    @property
    def about(self) -> dict[str, Any]:
        return json.loads((self.root / self.pack / "cases" / f"{self.name}.json").read_text())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.root / self.pack / "cases" / f"{self.name}.safetensors")

    @property
    def checkpoint(self) -> Path:
        return self.root / self.pack / "checkpoint"


def find_cases(root: Path) -> Iterator[Case]:
    for file in sorted(root.glob("*/cases/*.json")):
        yield Case(root, file.parent.parent.name, file.stem)


def assert_close(ours: Tensor, golden: Tensor, what: str) -> None:
    """The tolerance of the packs' README, section 2: max|a-b| <= 1e-4 max(1, max|ref|)."""
    assert ours.shape == golden.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(golden.shape)}"
    error = (ours.float() - golden.float()).abs().max().item()
    bound = 1e-4 * max(1.0, golden.abs().max().item())
    assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"


@lru_cache(maxsize=8)
def load_pipeline(root: Path, pack: str, name: str, scheduler: str | None = None, **options: Any) -> Pipeline:
    checkpoint = root / pack / "checkpoint"
    base = root / ("bases/sd15" if pack.endswith("sd15") or pack == "arc2face" else "bases/sdxl")
    files: dict[str, Any] = {}
    if pack == "instantid":
        files = {"adapter": checkpoint / "ip-adapter.bin", "controlnet": checkpoint / "ControlNetModel"}
    elif pack == "arc2face":
        files = {"adapter": checkpoint}
    else:
        files = {"adapter": next(checkpoint.glob("*.bin"))}
        if "faceid" not in pack or "plus" in pack:
            files["image_encoder"] = root / "bases/image_encoder"
    return idgen.load(name, base=base, device="cpu", dtype="float32", **files, **options)


class Recorder:
    """A callback that keeps what the packs recorded."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def __call__(self, step: Step) -> None:
        self.steps.append(step)


@dataclass
class Replay:
    """One case run through idgen, beside its recording."""

    case: Case
    pipeline: Pipeline
    requests: list[Request]
    latents: Tensor | None

    def run(self) -> tuple[Tensor, list[Step]]:
        recorder = Recorder()
        out = self.pipeline.generate_many(self.requests, latents=self.latents, output="latent", callback=recorder)
        return out, recorder.steps

    def conditioning(self) -> Any:
        return self.pipeline.condition([self.pipeline.order(r) for r in self.requests])

    def images(self) -> Tensor:
        portraits = [p for ps in self.pipeline.generate_many(self.requests, latents=self.latents) for p in ps]
        arrays = np.stack([np.asarray(p.image) for p in portraits])
        return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def replay(case: Case) -> Replay:
    about, tensors = case.about, case.tensors
    build = {"bases": _base, "instantid": _instantid, "arc2face": _arc2face}.get(case.pack, _ip_adapter)
    return build(case, about, tensors)


def _base(case: Case, about: dict[str, Any], tensors: dict[str, Tensor]) -> Replay:
    kind = "sdxl" if "sdxl" in case.name else "sd15"
    pipeline = idgen.load("text-to-image", base=case.root / "bases" / kind, device="cpu", dtype="float32")
    request = Request.create(
        prompt=about["prompt"],
        negative_prompt=about["negative_prompt"],
        n=about["num_images_per_prompt"],
        seed=about["latents_seed"],
        guidance=about["guidance_scale"],
        steps=about["num_inference_steps"],
        height=about["height"],
        width=about["width"],
    )
    return Replay(case, pipeline, [request], tensors["latents_in"])


def _ip_adapter(case: Case, about: dict[str, Any], tensors: dict[str, Tensor]) -> Replay:
    faceid, plus = "faceid" in case.pack, "plus" in case.pack
    if faceid and plus:
        name = "ip-adapter-faceid-plusv2" if about["shortcut"] else "ip-adapter-faceid-plus"
    else:
        name = "ip-adapter" + ("-faceid" if faceid else "") + ("-plus" if plus else "")
    pipeline = load_pipeline(case.root, case.pack, name)
    pictures = [Image.open(case.root / f).convert("RGB") for f in about.get("images") or []]
    common = {
        "prompt": about["prompt"],
        "negative_prompt": about["negative_prompt"],
        "identity_scale": about["scale"],
        "structure_scale": about.get("s_scale", 1.0),
        "n": about["num_samples"],
        "seed": about["seed"],
        "guidance": about["guidance_scale"],
        "steps": about["num_inference_steps"],
        "height": about["height"],
        "width": about["width"],
        "scheduler": "default",
    }
    if faceid:
        embeddings = tensors["faceid_embeds"].numpy()
        crops = pictures or [None] * len(embeddings)
        who = [idgen.Identity(embedding=e, crop=c) for e, c in zip(embeddings, crops)]
        requests = [Request.create(who=w, **common) for w in who]
    elif about.get("images"):
        requests = [Request.create(who=picture, **common) for picture in pictures]
    else:
        requests = [Request.create(image_embedding=row, **common) for row in tensors["clip_image_embeds"]]
    return Replay(case, pipeline, requests, tensors["latents_in"])


def _instantid(case: Case, about: dict[str, Any], tensors: dict[str, Tensor]) -> Replay:
    pipeline = load_pipeline(case.root, case.pack, "instantid")
    drawing = Image.open(case.root / case.pack / "cases" / about["control_image_file"]).convert("RGB")
    fields: dict[str, Any] = {
        "who": idgen.Identity(embedding=tensors["face_embedding"].numpy()),
        "prompt": about["prompt"],
        "negative_prompt": about["negative_prompt"],
        "identity_scale": about["ip_adapter_scale"],
        "structure_scale": about["controlnet_conditioning_scale"],
        "structure_start": about["control_guidance_start"],
        "structure_end": about["control_guidance_end"],
        "guess_mode": about["guess_mode"],
        "n": about["num_images_per_prompt"],
        "seed": about["seed"],
        "guidance": about["guidance_scale"],
        "steps": about["num_inference_steps"],
        "pose": drawing,
        "scheduler": "default",
    }
    if about["height"] is not None:
        fields |= {"height": about["height"], "width": about["width"]}
    latents = tensors.get("latents_in")
    if about["pipeline"] == "img2img":
        # The seed alone must reproduce both draws, of the VAE's posterior and of the noise.
        fields |= {"image": tensors["init_image"] / 2 + 0.5, "strength": about["strength"]}
        latents = None
    return Replay(case, pipeline, [Request.create(**fields)], latents)


def _arc2face(case: Case, about: dict[str, Any], tensors: dict[str, Tensor]) -> Replay:
    options = {} if about.get("normalise", True) else {"normalise": False}
    pipeline = load_pipeline(case.root, case.pack, "arc2face", **options)
    scheduler = {"dpm": "dpm++-2m", "ddim": "default", "euler": "euler"}[about["scheduler"]]
    fields: dict[str, Any] = {
        "n": about["num_images_per_prompt"],
        "seed": about["seed"],
        "guidance": about["guidance_scale"],
        "steps": about["num_inference_steps"],
        "height": about["height"],
        "width": about["width"],
        "negative_prompt": about["negative_prompt"],
        "scheduler": scheduler,
    }
    if "ref_latents" in tensors:
        fields["reference"] = tensors["ref_latents"]
    people = [idgen.Identity(embedding=row) for row in tensors["id_embedding"].numpy()]
    requests = [Request.create(who=person, **fields) for person in people]
    return Replay(case, pipeline, requests, tensors["latents_in"])
