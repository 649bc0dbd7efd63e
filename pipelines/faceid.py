"""IP-Adapter FaceID and its kin: a face-recognition embedding instead of CLIP features, and a LoRA that helps it along.

Source: repository tencent-ailab/IP-Adapter, ``ip_adapter_faceid.py``; weights h94/IP-Adapter-FaceID.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from idgen.adapters.checkpoints import read_adapter
from idgen.adapters.image_encoder import ImageEncoder
from idgen.adapters.projections import FacePlusProjection, MLPProjection
from idgen.caches import content_key, weights_state
from idgen.conditioning import Conditioning, TokenStream
from idgen.errors import BadRequest, BadWeights
from idgen.method import Defaults, Files, Method, Order, Weight, per_image, scales, unit
from idgen.pipelines.ip_adapter import NEGATIVE_PROMPT, PROMPT
from idgen.registry import register

BUFFALO = {"sdxl": "buffalo_l", "sd15": "buffalo_l", "mini-xl": "mini-faces"}


class FaceID(Method):
    """Common to all FaceID variants. The adapter's LoRA stays on at every identity scale, as in the original."""

    recogniser: ClassVar = BUFFALO
    defaults = Defaults(prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT)
    options: ClassVar = {"normalise": True}
    """``normalise``: L2-normalise the embedding; the ``unnorm`` portrait file wants it raw."""

    def __init__(self, backbone: Any, files: Files) -> None:
        super().__init__(backbone, files)
        self.adapter = read_adapter(files.paths["adapter"]).to(backbone.device, backbone.dtype)
        projection = self.adapter.projection
        plus = isinstance(projection, FacePlusProjection)
        if not isinstance(projection, MLPProjection) or plus != self.plus:
            raise BadWeights(
                f"{files.paths['adapter']} is not a file for {self.name}: "
                + ("it has no 'perceiver_resampler'." if self.plus else "its projection is of another kind.")
            )

    plus = False

    def condition(self, orders: list[Order]) -> Conditioning:
        positive, negative = zip(*(self.tokens(order) for order in orders))
        widest = max(tokens.shape[1] for tokens in positive)
        if any(tokens.shape[1] != widest for tokens in positive):
            raise BadRequest("identities of one batch must have the same number of photos for this pipeline.", "who")
        stream = TokenStream(
            self.adapter.stream,
            per_image(orders, positive),
            per_image(orders, negative),
            scales(orders, lambda order: order.identity_scale),
        )
        return Conditioning(self.text(orders), [stream], loras=[self.adapter.lora] if self.adapter.lora else [])

    def tokens(self, order: Order) -> tuple[Tensor, Tensor]:
        """Identity tokens (1, N, C) of the person and of nobody (a zero embedding through the same projection)."""
        rows, project = self.embedding(order), self.adapter.projection

        def make() -> tuple[Tensor, Tensor]:
            embedding = self._to_device(rows)
            return project(embedding), project(torch.zeros_like(embedding))

        return self.cache.get((content_key(rows), weights_state(project)), make)

    def embedding(self, order: Order) -> np.ndarray:
        """(1, 512) as the projection reads it"""
        rows = self._rows(order)
        if self.option["normalise"]:
            rows = unit(unit(rows).mean(0, keepdims=True))
        return rows.mean(0, keepdims=True)

    def _to_device(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows.copy()).to(self.backbone.device, self.backbone.dtype)

    def _rows(self, order: Order) -> np.ndarray:
        """The raw embeddings, [k, 512]."""
        if order.embedding is None:
            raise BadRequest(f"{self.name} needs a photo or an identity.", "who")
        return order.embedding.reshape(-1, 512)


class FaceIDPlus(FaceID):
    """FaceID tokens refined by CLIP features of the aligned face crop."""

    plus = True
    shortcut = True

    def __init__(self, backbone: Any, files: Files) -> None:
        super().__init__(backbone, files)
        if "image_encoder" not in files.paths:
            raise BadRequest(f"{self.name} needs an image encoder: load it with image_encoder=FOLDER.", "image_encoder")
        self.encoder = ImageEncoder.load(files.paths["image_encoder"], backbone.device, backbone.dtype)

    def tokens(self, order: Order) -> tuple[Tensor, Tensor]:
        rows = self.embedding(order)
        who = order.identity
        crop = who.crop if who is not None else None
        if who is not None and crop is not None and crop.size == (256, 256) and self.backbone.family == "sd15":
            # SDXL's adapters were trained on 256-pixel aligned crops, SD1.5's on the tighter 224.
            crop = who.aligned_crop(224)
        if crop is None:
            raise BadRequest(
                f"{self.name} needs a face crop beside the embedding: make the identity from a photo.", "who"
            )
        face, project, weight = crop, self.adapter.projection, order.structure_scale
        state = weights_state(self.encoder.model)

        def make() -> tuple[Tensor, Tensor]:
            embedding = self._to_device(rows)
            # The encoder's features by themselves: another weight of the refinement needs the projection alone.
            seen = self.cache.get(("patches", content_key(face), state), lambda: self.encoder.patches([face]))
            blank = self.cache.get(("patches", None, state), self.encoder.blank_patches)
            person = project(embedding, seen, self.shortcut, weight)
            return person, project(torch.zeros_like(embedding), blank, self.shortcut, weight)

        return self.cache.get((content_key(rows, face), weight, state, weights_state(project)), make)


@register("ip-adapter-faceid")
class IPAdapterFaceID(FaceID):
    """4 tokens from the face embedding alone."""

    description = "face embedding only: free in pose, hair and expression"
    weights: ClassVar = {
        "sdxl": {"adapter": Weight("ip-adapter-faceid_sdxl")},
        "sd15": {"adapter": Weight("ip-adapter-faceid_sd15")},
        "mini-xl": {"adapter": Weight("ip-adapter-faceid_mini-xl")},
    }


@register("ip-adapter-faceid-plus")
class IPAdapterFaceIDPlus(FaceIDPlus):
    """The first Plus: the refinement replaces the FaceID tokens."""

    description = "face embedding and face picture (first version; SD1.5 only)"
    shortcut = False
    weights: ClassVar = {
        "sd15": {"adapter": Weight("ip-adapter-faceid-plus_sd15"), "image_encoder": Weight("clip-vit-h")}
    }


@register("ip-adapter-faceid-plusv2")
class IPAdapterFaceIDPlusV2(FaceIDPlus):
    """The refinement is added to the FaceID tokens; ``structure_scale`` weighs it."""

    description = "face embedding and face picture, weighed by structure_scale: the best of the FaceID family"
    weights: ClassVar = {
        "sdxl": {"adapter": Weight("ip-adapter-faceid-plusv2_sdxl"), "image_encoder": Weight("clip-vit-h")},
        "sd15": {"adapter": Weight("ip-adapter-faceid-plusv2_sd15"), "image_encoder": Weight("clip-vit-h")},
        "mini-xl": {
            "adapter": Weight("ip-adapter-faceid-plusv2_mini-xl"),
            "image_encoder": Weight("mini-image-encoder"),
        },
    }


@register("ip-adapter-faceid-portrait")
class IPAdapterFaceIDPortrait(FaceID):
    """16 tokens for each of several photos of the person (the authors use 5); no LoRA."""

    each_photo = True
    description = "16 tokens for each of several photos of the person (best with 5)"
    weights: ClassVar = {
        "sdxl": {"adapter": Weight("ip-adapter-faceid-portrait_sdxl")},
        "sd15": {"adapter": Weight("ip-adapter-faceid-portrait_sd15")},
    }

    def embedding(self, order: Order) -> np.ndarray:
        """(1, k, 512): every photo of the person by itself, not their mean."""
        rows = self._rows(order)
        return (unit(rows) if self.option["normalise"] else rows)[None]
