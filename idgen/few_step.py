"""Few-step LoRAs: distilled updates of the UNet that make a picture in 4 to 8 steps, beside any identity adapter.

Steps, guidance and schedulers are the publishers' own (the model pages that the manifest names).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idgen.errors import BadRequest, BadWeights

if TYPE_CHECKING:
    from idgen.backbone import Backbone
    from idgen.method import Defaults


@dataclass(frozen=True)
class FewStep:
    """One LoRA and the settings that it was distilled for."""

    weights: dict[str, str]
    """family of the base -> manifest entry"""
    steps: int
    guidance: float
    """up to 1: off, so that the unconditional half is not computed"""
    scheduler: str

    def defaults(self, own: Defaults) -> Defaults:
        """A method's defaults with this one's steps, guidance and scheduler; what a request names wins over both."""
        return replace(own, steps=self.steps, guidance=self.guidance, scheduler=self.scheduler)


FEW_STEP = {
    "lcm": FewStep({"sdxl": "lcm-lora_sdxl", "sd15": "lcm-lora_sd15"}, 6, 1.5, "lcm"),
    "lightning-4": FewStep({"sdxl": "sdxl-lightning-4step"}, 4, 1.0, "euler-trailing"),
    "hyper-sd-8": FewStep({"sdxl": "hyper-sd_sdxl-8step"}, 8, 1.0, "ddim-trailing"),
    "dmd2": FewStep({"sdxl": "dmd2_sdxl-4step"}, 4, 1.0, "dmd2"),
}
"""lever -> LoRA and settings"""


def few_step_entry(name: str, base: str) -> str:
    """The manifest entry of a few-step LoRA for a base, by the base's name (:func:`idgen.bases.base_name`).

    Raises:
        BadRequest: there is none; names what to use instead.
    """
    weights = FEW_STEP[name].weights
    if base in weights:
        return weights[base]
    if base.startswith("mini"):
        fitting, entry = next(iter(weights.items()))
        raise BadRequest(
            f"few_step is {name!r}, but mini has no few-step LoRA: use the base {' or '.join(weights)} "
            f"(idgen weights pull {fitting} {entry}), or leave few_step out.",
            "few_step",
        )
    fitting = ", ".join(other for other, each in FEW_STEP.items() if base in each.weights)
    raise BadRequest(f"few_step is {name!r}, which has no LoRA for {base}; use {fitting}.", "few_step")


def use_few_step(backbone: Backbone, unet: Any, name: str) -> None:
    """Add a few-step LoRA to the weights of a UNet, once for a UNet.

    It is merged, so that a step costs no more than without it, and stays when user LoRAs come and go.

    Raises:
        BadRequest: there is none for this base, or the UNet cannot be changed now; names the cure.
        WeightsMissing, LicenceRefused: the LoRA is not here; its licence is refused.
        BadWeights: the file is no LoRA for this UNet.
    """
    from idgen.bases import base_name
    from idgen.locate import locate
    from idgen.weights.licences import commercial_only, refuse_if_not_commercial

    there = getattr(unet, "_idgen_few_step", None)
    if there == name:
        return
    entry = few_step_entry(name, base_name(backbone))
    if there is not None or backbone.loras():
        inside = f"few_step={there!r}" if there is not None else "user LoRAs"
        raise BadRequest(
            f"this backbone already holds {inside}: load another one with few_step={name!r}, then add LoRAs.",
            "few_step",
        )
    if backbone.offload == "sequential":
        raise BadRequest("few_step cannot change weights that offload='sequential' put away; use 'model'.", "offload")
    if commercial_only():
        refuse_if_not_commercial([entry])
    _merge(backbone, unet, locate(entry))
    unet._idgen_few_step = name


def _merge(backbone: Backbone, unet: Any, path: Path) -> None:
    from idgen.user_weights import explain_loading

    pipe = backbone.pipe
    with explain_loading(path, "a LoRA", backbone.family):
        state, alphas = pipe.lora_state_dict(
            str(path.parent), weight_name=path.name, unet_config=unet.config, local_files_only=True
        )
        pipe.load_lora_into_unet(state, network_alphas=alphas, unet=unet, adapter_name="few_step")
    if not getattr(unet, "peft_config", None):
        raise BadWeights(f"{path} has no LoRA for any layer of this UNet.")
    unet.fuse_lora(adapter_names=["few_step"])
    unet.unload_lora()
    unet.requires_grad_(False)
