"""What can be traded for speed: exact levers (always on where they help) and approximate ones (off unless asked for).

``speed="exact"`` is the default: the numbers are those of the plain computation up to rounding. ``"fast"`` and
``"turbo"`` are named sets of approximate levers; each lever is also a field of :class:`Levers`. docs/performance.md has
the measured gain and the measured error of every one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from idgen.errors import BadRequest
from idgen.few_step import FEW_STEP

COMPILE = ("regional", "full")
QUANTISE = ("int8", "fp8")


@dataclass(frozen=True)
class Levers:
    """One switch each. The defaults change nothing but the time."""

    lean: bool = True
    """Exact. Blocks without detours and fused projections (:mod:`idgen.adapters.lean`); ignored under ``compile``."""
    compile: str | None = None
    """Exact. ``"regional"``: torch.compile of the repeated transformer block, ready within seconds; ``"full"``: of the
    whole network, with CUDA graphs on a GPU."""
    channels_last: bool | None = None
    """Exact. Convolution weights and activations in NHWC order; ``None``: on a GPU, where tensor cores want it."""
    guidance_until: float = 1.0
    """Guidance in the first part of the steps only; after it the unconditional half is not computed
    (arXiv:2404.07724)."""
    structure_until: float = 1.0
    """ControlNet branches in the first part of the steps only: the layout is settled early."""
    structure_half: bool = False
    """ControlNet branches on the conditional half only."""
    cache_every: int = 1
    """Recompute the deep blocks of UNet and ControlNet at every k-th step only; between, the outermost block alone runs
    on their last features (DeepCache, arXiv:2312.00858)."""
    tiny_vae: str | None = None
    """A tiny autoencoder (manifest entry ``taesdxl`` or ``taesd``, or a folder) instead of the base's."""
    quantise: str | None = None
    """``"int8"`` (anywhere) or ``"fp8"`` (Hopper and Ada) for the linear layers of the UNet and the ControlNet, through
    torchao: weights at load, activations as they come."""

    few_step: str | None = None
    """A few-step LoRA merged into the UNet at load: ``"lcm"``, ``"lightning-4"``, ``"hyper-sd-8"``, ``"dmd2"``. Steps,
    guidance and scheduler are then its own unless a request names others (:mod:`idgen.few_step`)."""

    def __post_init__(self) -> None:
        for name in ("guidance_until", "structure_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadRequest(f"{name} is {getattr(self, name)}; it is a share of the steps, 0 to 1.", name)
        if self.cache_every < 1:
            raise BadRequest(f"cache_every is {self.cache_every}; it counts steps, 1 or more.", "cache_every")
        for name, allowed in (("compile", COMPILE), ("quantise", QUANTISE), ("few_step", tuple(FEW_STEP))):
            if getattr(self, name) not in (None, *allowed):
                said = f"{name} is {getattr(self, name)!r}; choose {_list(allowed)}, or leave it out."
                raise BadRequest(said, name)
        if self.compile == "full" and self.cache_every > 1:
            raise BadRequest(
                "compile='full' keeps a CUDA graph of the whole network, which cannot skip blocks: "
                "use compile='regional' with cache_every.",
                "compile",
            )

    @property
    def exact(self) -> bool:
        """Whether results are those of the plain computation up to rounding."""
        plain = Levers(lean=self.lean, compile=self.compile, channels_last=self.channels_last)
        return self == plain

    @property
    def run_lean(self) -> bool:
        """Whether the sampler replaces block forwards: torch.compile would have to compile the replacements anew."""
        return self.lean and self.compile is None

    def change(self, **levers: Any) -> Levers:
        """A copy with other values.

        Raises:
            BadRequest: there is no such lever, or not that value.
        """
        known = [f.name for f in fields(self)]
        for name in levers:
            if name not in known:
                raise BadRequest(f"there is no lever {name!r}; there are {', '.join(known)}.", name)
        return replace(self, **levers)

    @property
    def load_key(self) -> tuple[Any, ...]:
        """The levers that change resident models: backbones that differ in these are not shared."""
        return tuple(getattr(self, name) for name in LOAD_LEVERS)

    def at_load_of(self, loaded: Levers) -> Levers:
        """These levers for a run on models that were loaded with others."""
        return replace(self, **{name: getattr(loaded, name) for name in ("lean", *LOAD_LEVERS)})

    def upon(self, loaded: Levers) -> Levers:
        """These levers on models that others have changed before: what those did and these leave open stays."""
        open_names = [name for name in LOAD_LEVERS if getattr(self, name) is None]
        return replace(self, **{name: getattr(loaded, name) for name in open_names})

    def guided(self, step: int, steps: int) -> bool:
        """Whether ``step`` of ``steps`` computes the unconditional half."""
        return step < round(self.guidance_until * steps)

    def fresh(self, step: int) -> bool:
        """Whether ``step`` recomputes the deep blocks."""
        return step % self.cache_every == 0


LOAD_LEVERS = ("compile", "channels_last", "tiny_vae", "quantise", "few_step")
"""Those that change resident models; ``None`` where they do not."""

PRESETS = {
    "exact": Levers(),
    "fast": Levers(guidance_until=0.6, cache_every=2),
    "turbo": Levers(guidance_until=0.5, structure_until=0.7, cache_every=3),
}
"""``fast`` stays near the exact picture; ``turbo`` keeps the person and the prompt, not every detail."""


def preset(name: str) -> Levers:
    """The levers of a preset, which is all that a command line or a settings file can name.

    Raises:
        BadRequest: there is no such preset.
    """
    if name not in PRESETS:
        raise BadRequest(f"speed is {name!r}; choose {_list(tuple(PRESETS))}.", "speed")
    return PRESETS[name]


def choose_levers(speed: str | Levers, few_step: str | None = None) -> Levers:
    """A preset by name, or levers as they are; ``few_step``, where it is given, takes the place of theirs.

    Raises:
        BadRequest: there is no such preset, or no such few-step LoRA.
    """
    if not isinstance(speed, Levers):
        if speed not in PRESETS:
            said = f"speed is {speed!r}; choose {_list(tuple(PRESETS))}, or give levers as idgen.speed.Levers(...)."
            raise BadRequest(said, "speed")
        speed = PRESETS[speed]
    return speed if few_step is None else speed.change(few_step=few_step)


def _list(values: tuple[str, ...]) -> str:
    return f"{', '.join(values[:-1])} or {values[-1]}"
