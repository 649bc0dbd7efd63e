"""IP-Adapter with an image prompt: plain, Plus, Plus-Face (arXiv:2308.06721; repository tencent-ailab/IP-Adapter)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from idgen.adapters.checkpoints import read_adapter
from idgen.adapters.image_encoder import ImageEncoder
from idgen.adapters.projections import ImageProjection, PatchProjection, Resampler
from idgen.caches import content_key, weights_state
from idgen.conditioning import Conditioning, TokenStream
from idgen.errors import BadRequest, BadWeights
from idgen.method import Defaults, Files, Method, Order, Weight, per_image, scales
from idgen.registry import register

PROMPT = "best quality, high quality"
NEGATIVE_PROMPT = "monochrome, lowres, bad anatomy, worst quality, low quality"


class ImagePrompt(Method):
    """A picture's CLIP features become identity tokens."""

    defaults = Defaults(prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT)

    def __init__(self, backbone, files: Files) -> None:  # type: ignore[no-untyped-def]
        super().__init__(backbone, files)
        self.adapter = read_adapter(files.paths["adapter"]).to(backbone.device, backbone.dtype)
        projection = self.adapter.projection
        if not isinstance(projection, (ImageProjection, PatchProjection, Resampler)):
            raise BadWeights(f"{files.paths['adapter']} is a FaceID file; use one of the ip-adapter-faceid pipelines.")
        encoder = files.paths.get("image_encoder")
        self.encoder = ImageEncoder.load(encoder, backbone.device, backbone.dtype) if encoder else None

    def condition(self, orders: list[Order]) -> Conditioning:
        positive, negative = zip(*(self._tokens(order) for order in orders))
        stream = TokenStream(
            self.adapter.stream,
            per_image(orders, positive),
            per_image(orders, negative),
            scales(orders, lambda order: order.identity_scale),
        )
        return Conditioning(self.text(orders), [stream])

    def _tokens(self, order: Order) -> tuple[Tensor, Tensor]:
        """(1, N, C) for the picture and for no picture. Several pictures are averaged after projection."""
        project = self.adapter.projection
        embedding = order.request.image_embedding
        if embedding is not None:
            if not isinstance(project, ImageProjection):
                raise BadRequest(f"{self.name} reads image patches; it takes no image_embedding.", "image_embedding")
            embedding = torch.as_tensor(embedding).to(self.backbone.device, self.backbone.dtype).reshape(1, -1)
            if embedding.shape[1] != project.proj.in_features:
                raise BadRequest(
                    f"image_embedding has {embedding.shape[1]} numbers, this adapter needs {project.proj.in_features}.",
                    "image_embedding",
                )
            return project(embedding), project(embedding * 0)
        if self.encoder is None:
            raise BadRequest(f"{self.name} needs an image encoder: load it with image_encoder=FOLDER.", "image_encoder")
        if not order.pictures:
            raise BadRequest(f"{self.name} needs a photo.", "who")
        encoder, pictures = self.encoder, list(order.pictures)
        state = weights_state(encoder.model)

        def make() -> tuple[Tensor, Tensor]:
            if isinstance(project, ImageProjection):
                seen = encoder.embed(pictures)
                return project(seen).mean(0, keepdim=True), project(torch.zeros_like(seen[:1]))
            blank = self.cache.get(("patches", None, state), encoder.blank_patches)
            return project(encoder.patches(pictures)).mean(0, keepdim=True), project(blank)

        return self.cache.get((content_key(*pictures), state, weights_state(project)), make)


def _weights(sd15: str, sdxl: str, sdxl_encoder: str = "clip-vit-h") -> dict[str, dict[str, Weight]]:
    return {
        "sdxl": {"adapter": Weight(sdxl), "image_encoder": Weight(sdxl_encoder)},
        "sd15": {"adapter": Weight(sd15), "image_encoder": Weight("clip-vit-h")},
    }


@register("ip-adapter")
class IPAdapter(ImagePrompt):
    """The CLIP image embedding as 4 tokens: the gist of a whole picture."""

    description = "a whole picture as prompt: its gist, style and colours; no face recognition"
    weights: ClassVar = _weights("ip-adapter_sd15", "ip-adapter_sdxl_vit-h")


@register("ip-adapter-plus")
class IPAdapterPlus(ImagePrompt):
    """CLIP patch features as 16 tokens: closer to the picture."""

    description = "a whole picture as prompt, closer to it than ip-adapter"
    weights: ClassVar = _weights("ip-adapter-plus_sd15", "ip-adapter-plus_sdxl_vit-h")


@register("ip-adapter-plus-face")
class IPAdapterPlusFace(ImagePrompt):
    """Plus, trained on face crops. All its weights allow commercial use; the crop is the user's or the detector's."""

    description = "a face crop as prompt, by CLIP features alone; every weight allows commercial use"
    weights: ClassVar = _weights("ip-adapter-plus-face_sd15", "ip-adapter-plus-face_sdxl_vit-h")
    defaults = Defaults(prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT, identity_scale=0.5)
