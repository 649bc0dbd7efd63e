"""The base model by itself: what every method is compared with."""

from __future__ import annotations

from typing import ClassVar

from idgen.conditioning import Conditioning
from idgen.method import Defaults, Method, Order
from idgen.registry import register


@register("text-to-image")
class TextToImage(Method):
    """No identity at all."""

    description = "no identity: the base model by itself, to compare with"
    weights: ClassVar = {"sdxl": {}, "sd15": {}, "mini-xl": {}}
    defaults = Defaults(guidance=5.0)

    def condition(self, orders: list[Order]) -> Conditioning:
        return Conditioning(self.text(orders))
