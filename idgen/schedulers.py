"""Schedulers by their usual names, built from the base model's own scheduler config."""

from __future__ import annotations

from typing import Any

from idgen.errors import BadRequest

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "euler-trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddim-trailing": (
        "DDIMScheduler",
        {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"},
    ),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++-2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++-2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++-2m-sde-karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpm++-sde-karras": ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {}),
    # Steps at 999, 749, 499, 249, for which DMD2 was distilled.
    "dmd2": ("LCMScheduler", {"original_inference_steps": 4}),
    "tcd": ("TCDScheduler", {}),
}
"""name -> (class in diffusers, settings on top of the base's config). The names are those of the field's user
interfaces; diffusers' documentation ("Schedulers", table of k-diffusion names) gives the same mapping."""


BASES_OWN = ("clip_sample", "set_alpha_to_one")
"""Settings that a base with this scheduler decides itself: one of zero terminal SNR needs its ``set_alpha_to_one``."""


def make_scheduler(name: str | None, base: Any) -> Any:
    """A fresh scheduler.

    Args:
        name: one of ``SCHEDULERS``; ``None`` or ``"default"`` for the base model's own.
        base: the base model's scheduler, whose config (betas, prediction type, spacing) is kept.
    Raises:
        BadRequest: the name is unknown; the message lists those there are.
    """
    if name is None or name == "default":
        return type(base).from_config(base.config)
    if name not in SCHEDULERS:
        raise BadRequest(f"scheduler {name!r} is unknown; choose one of {', '.join(SCHEDULERS)}.", "scheduler")
    import diffusers

    kind, settings = SCHEDULERS[name]
    cls = getattr(diffusers, kind)
    config = dict(base.config)
    if isinstance(base, cls):
        settings = {k: v for k, v in settings.items() if k not in BASES_OWN or k not in config}
    return cls.from_config(config, **settings)
