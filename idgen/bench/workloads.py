"""What is measured: a picture made by the baseline and by idgen, from the same weights and inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from idgen.backbone import Backbone
from idgen.bench import models
from idgen.bench.baselines import PlainInstantID, StockIPAdapter
from idgen.bench.inputs import Inputs
from idgen.conditioning import Conditioning
from idgen.prepare import prepare
from idgen.sampler import sample
from idgen.schedulers import make_scheduler
from idgen.speed import Levers

KINDS = ("ip-adapter", "instantid", "regions")
"""``regions``: four identities, each in its quarter of the picture."""


@dataclass(eq=False)
class Workload:
    """One kind at one size. Everything stays on the device between calls."""

    kind: str
    size: models.Size
    backbone: Backbone
    controlnet: Any
    weights: Any
    inputs: Inputs

    @classmethod
    def make(
        cls,
        kind: str,
        size: models.Size,
        device: str = "cpu",
        dtype: str = "float32",
        batch: int = 1,
        people: int | None = None,
        like: Workload | None = None,
    ) -> Workload:
        """``like``: another workload of the same size, device and dtype, whose models are used as well."""
        backbone = like.backbone if like is not None else models.backbone(size, device, dtype)
        controlnet = like.controlnet if like is not None else None
        if kind == "instantid" and controlnet is None:
            controlnet = models.controlnet(size, device, dtype)
        weights = like.weights if like is not None else models.stream_weights(backbone.unet)
        people = people or (4 if kind == "regions" else 1)
        return cls(kind, size, backbone, controlnet, weights, Inputs.random(size, device, dtype, batch, people))

    def prepare(self, levers: Levers) -> None:
        """Apply the levers that change models."""
        prepare(self.backbone, [self.controlnet] if self.controlnet is not None else [], levers)

    def conditioning(self) -> Conditioning:
        """As a pipeline builds it, anew for each picture: projections of the identity are part of the time."""
        if self.kind == "instantid":
            return self.inputs.instantid(self.weights, self.controlnet)
        return self.inputs.ip_adapter(self.weights)

    def resize(self, latent: int) -> None:
        """From now on pictures of ``8 * latent`` pixels a side; the models stay."""
        inputs = self.inputs
        people = inputs.images.shape[1]
        size = replace(self.size, latent=latent)
        dtype = str(inputs.text.dtype).removeprefix("torch.")
        self.inputs = Inputs.random(size, str(inputs.text.device), dtype, len(inputs.text), people)

    def ours(self, steps: int, guidance: float = 5.0, levers: Levers | None = None, attention: str = "sdpa") -> Tensor:
        """idgen's final latents, (B, c, h, w)."""
        return sample(
            self.backbone,
            self.conditioning(),
            self.inputs.start,
            make_scheduler(None, self.backbone.scheduler),
            steps=steps,
            guidance=guidance,
            attention=attention,
            levers=levers or Levers(),
        )

    def baseline(self) -> Any:
        """A callable (steps, guidance) -> latents: the stock pipeline, or the straightforward InstantID loop."""
        if self.kind == "instantid":
            return PlainInstantID(self.backbone, self.controlnet, self.weights, self.inputs)
        return StockIPAdapter(self.backbone, self.weights, self.inputs)
