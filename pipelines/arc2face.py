"""Arc2Face (arXiv:2403.11641; repository foivospar/Arc2Face): the face embedding speaks through the text channel."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from idgen.adapters.face_tokens import encode_faces, encode_text, load_text_encoder
from idgen.adapters.loading import dtype_option
from idgen.caches import content_key, weights_state
from idgen.conditioning import Conditioning, TextTokens
from idgen.errors import BadRequest, BadWeights, WeightsMissing
from idgen.images import open_photo
from idgen.method import Defaults, Files, Method, Order, Weight, per_image, unit
from idgen.registry import register


@register("arc2face")
class Arc2Face(Method):
    """A fine-tuned SD1.5 UNet and text encoder; the prompt is fixed, the person is all there is to say."""

    description = "the face and nothing else, in great variety (SD1.5); takes no prompt"
    weights: ClassVar = {
        "sd15": {"adapter": Weight("arc2face")},
        "mini-sd15": {"adapter": Weight("arc2face_mini-sd15")},
    }
    recogniser: ClassVar = {"sd15": "arcface", "mini-sd15": "mini-faces"}
    detector = "antelopev2"
    # The authors' demo: DPM++ 25 steps, guidance 3.
    defaults = Defaults(steps=25, guidance=3.0, scheduler="dpm++-2m")
    options: ClassVar = {"normalise": True}
    speaks_text = True

    def __init__(self, backbone: Any, files: Files) -> None:
        super().__init__(backbone, files)
        if backbone.family != "sd15":
            raise BadRequest("arc2face needs an SD1.5 base: load it with base='sd15'.", "base")
        folder = files.paths["adapter"]
        self.encoder = load_text_encoder(folder / "encoder").to(backbone.device, backbone.dtype)
        self.unet = _load_unet(folder / "arc2face", backbone)
        width = self.encoder.get_input_embeddings().weight.shape[1]
        if self.unet.config.cross_attention_dim != width:
            raise BadWeights(
                f"{folder}: the encoder is {width} wide, the UNet expects {self.unet.config.cross_attention_dim}."
            )

    def condition(self, orders: list[Order]) -> Conditioning:
        references = [order.request.reference for order in orders]
        if any(reference is not None for reference in references) and not orders[0].guided:
            raise BadRequest("reference needs guidance above 1.", "guidance")
        reference = None
        if all(r is not None for r in references):
            reference = torch.cat([self._reference(order) for order in orders])
        return Conditioning(self.text(orders), unet=self.unet, reference=reference)

    def text(self, orders: list[Order]) -> TextTokens:
        """Face tokens for the positive half; plain text through the same encoder for the negative."""
        tokenizer = self.backbone.pipe.tokenizer
        # A textual inversion adds words to the tokenizer; the user's LoRAs do not reach this method's own encoder.
        state = (weights_state(self.encoder), len(tokenizer))
        positive = []
        for order in orders:
            if order.embedding is None:
                raise BadRequest("arc2face needs a photo or an identity.", "who")
            rows = order.embedding.reshape(-1, 512)
            value = unit(unit(rows).mean(0)) if self.option["normalise"] else rows.mean(0)
            face = torch.from_numpy(value)[None]
            make = partial(encode_faces, self.encoder, tokenizer, face)
            positive.append(self.cache.get((content_key(value), state), make))
        if not orders[0].guided:
            return TextTokens(per_image(orders, positive), None)
        negative = []
        for order in orders:
            words = order.negative_prompt or ""
            make = partial(encode_text, self.encoder, tokenizer, words)
            negative.append(self.cache.get(("words", words, state), make))
        return TextTokens(per_image(orders, positive), per_image(orders, negative))

    def _reference(self, order: Order) -> torch.Tensor:
        """Latents (n, c, h, w) of the picture to attend to; latents themselves are taken as they are."""
        reference = order.request.reference
        if isinstance(reference, torch.Tensor):
            return reference[-len(order.seeds) :]
        image = open_photo(reference).resize((order.width, order.height))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        return self.backbone.encode_image(pixels).repeat_interleave(len(order.seeds), 0)


def _load_unet(folder: Path, backbone: Any) -> Any:
    from diffusers import UNet2DConditionModel

    if not (folder / "config.json").is_file():
        if backbone.unet.config.cross_attention_dim >= 512 and not folder.exists():
            # A base whose own UNet was trained on face tokens needs no second copy of it.
            return backbone.unet
        raise WeightsMissing(f"there is no UNet in {folder}: config.json is missing.")
    try:
        model, info = UNet2DConditionModel.from_pretrained(
            folder,
            **dtype_option(backbone.dtype),
            low_cpu_mem_usage=False,
            output_loading_info=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise BadWeights(f"{folder} is not a UNet ({str(error).splitlines()[0]}).") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise BadWeights(f"{folder}: {what[:-5]} key {next(iter(info[what]))!r}.")
    return model.to(backbone.device).eval().requires_grad_(False)
