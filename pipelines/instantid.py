"""InstantID (arXiv:2401.07519; repository InstantX/InstantID): one token stream and a face-structure ControlNet."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from idgen.adapters.checkpoints import read_adapter
from idgen.adapters.control import load_controlnet, resize_control
from idgen.adapters.projections import Resampler
from idgen.caches import content_key, weights_state
from idgen.conditioning import Conditioning, ControlBranch, TokenStream
from idgen.errors import BadRequest, BadWeights
from idgen.keypoints import draw_keypoints
from idgen.method import Defaults, Files, Method, Order, Weight, per_image, scales
from idgen.registry import register


@register("instantid")
class InstantID(Method):
    """The raw face embedding through a resampler; IdentityNet, which sees only these tokens, places the face."""

    description = "the strongest likeness on SDXL, with control over the face's place and pose"
    weights: ClassVar = {
        "sdxl": {
            "adapter": Weight("instantid", ("ip-adapter.bin", "ip-adapter.safetensors")),
            "controlnet": Weight("instantid", ("ControlNetModel",)),
        },
        "mini-xl": {
            "adapter": Weight("instantid_mini-xl", ("ip-adapter.safetensors",)),
            "controlnet": Weight("instantid_mini-xl", ("ControlNetModel",)),
        },
    }
    recogniser: ClassVar = {"sdxl": "antelopev2", "mini-xl": "mini-faces"}
    # Scales, steps and guidance of the authors' README; 1016 because SDXL puts watermarks at exactly 1024 x 1024.
    defaults = Defaults(guidance=5.0, identity_scale=0.8, structure_scale=0.8, scheduler="euler", size=(1016, 1016))

    def __init__(self, backbone: Any, files: Files) -> None:
        super().__init__(backbone, files)
        self.adapter = read_adapter(files.paths["adapter"]).to(backbone.device, backbone.dtype)
        if not isinstance(self.adapter.projection, Resampler) or self.adapter.projection.proj_in.in_features != 512:
            raise BadWeights(
                f"{files.paths['adapter']} is not an InstantID adapter: its resampler does not take 512 numbers."
            )
        if "controlnet" not in files.paths:
            raise BadRequest(
                "instantid needs its face-structure network: load it with controlnet=FOLDER.", "controlnet"
            )
        self.controlnet = load_controlnet(files.paths["controlnet"], backbone.device, backbone.dtype)

    def condition(self, orders: list[Order]) -> Conditioning:
        positive, negative = zip(*(self._tokens(order) for order in orders))
        person, nobody = per_image(orders, positive), per_image(orders, negative)
        stream = TokenStream(self.adapter.stream, person, nobody, scales(orders, lambda order: order.identity_scale))
        request = orders[0].request
        branch = ControlBranch(
            self.controlnet,
            per_image(orders, [self._control_image(order) for order in orders]),
            scales(orders, lambda order: order.structure_scale),
            person,
            nobody,
            start=request.structure_start,
            end=request.structure_end,
            guess_mode=request.guess_mode,
        )
        return Conditioning(self.text(orders), [stream], [branch])

    def _tokens(self, order: Order) -> tuple[Tensor, Tensor]:
        """(1, N, C). Several embeddings are one sequence of k features (a fused identity), not a batch."""
        if order.embedding is None:
            raise BadRequest("instantid needs a photo or an identity.", "who")
        embedding, project = order.embedding.reshape(1, -1, 512), self.adapter.projection

        def make() -> tuple[Tensor, Tensor]:
            rows = torch.from_numpy(embedding.copy()).to(self.backbone.device, self.backbone.dtype)
            return project(rows), project(torch.zeros_like(rows))

        return self.cache.get((content_key(embedding), weights_state(project)), make)

    def _control_image(self, order: Order) -> Tensor:
        """The five keypoints, drawn as in the original: from the pose given, else from the identity's own photo."""
        pose, size = order.request.pose, (order.width, order.height)
        if pose is None:
            if order.identity is None or order.identity.keypoints is None:
                raise BadRequest(
                    "instantid needs to know where the face goes: give pose=PHOTO or pose=KEYPOINTS.", "pose"
                )
            pose = _fit(order.identity.keypoints, order.identity.keypoints_size, size)
        if isinstance(pose, np.ndarray) and pose.shape == (5, 2):
            pose = draw_keypoints(size, pose)
        return resize_control(pose, *size)


def _fit(keypoints: np.ndarray, source: tuple[int, int] | None, size: tuple[int, int]) -> np.ndarray:
    """Keypoints of a photo carried to the output's frame: the photo scaled to fit inside it, centred."""
    if source is None:
        return keypoints
    scale = min(size[0] / source[0], size[1] / source[1])
    margin = (np.array(size) - np.array(source) * scale) / 2
    return (keypoints * scale + margin).astype(np.float32)
