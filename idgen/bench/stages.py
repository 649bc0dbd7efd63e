"""Which part of making one portrait takes how long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from idgen.request import Request
from idgen.text import encode_negative, encode_prompt


def stages(pipe: Any, photo: Any, prompt: str | None, steps: int) -> dict[str, float]:
    """Stage -> ms of process CPU time for one portrait of a person that no cache knows, everything else being warm.

    Args:
        pipe: an :class:`idgen.pipeline.Pipeline` on the CPU whose face cache does not hold the photo.
    """
    spent: dict[str, float] = {}
    pipe.backbone.text_cache.clear()
    for method in pipe.methods:
        method.cache.clear()
    spent["faces"] = _timed(lambda: pipe.extractor.faces(photo))
    order = pipe.order(Request.create(who=photo, prompt=prompt, seed=0, steps=steps, pipeline=pipe.name))
    spent["text"] = _timed(lambda: _encode(pipe, order))
    spent["identity"] = _timed(lambda: pipe.condition([order]))
    networks = {"UNet": pipe.backbone.unet, "VAE": pipe.backbone.vae.decoder}
    controlnet = next((m.controlnet for m in pipe.methods if getattr(m, "controlnet", None) is not None), None)
    if controlnet is not None:
        networks["IdentityNet"] = controlnet
    made: list[Any] = []
    with _watched(networks) as inside:
        rest = _timed(lambda: made.extend(pipe.generate_many([order])[0]))
    spent |= inside
    # The sampler looked at the portrait already, and a cache of faces remembers it: look at another one in between.
    pipe.extractor.faces(photo)
    spent["likeness"] = _timed(lambda: pipe.likeness(order.identity, made[0].image))
    spent["rest"] = max(0.0, rest - sum(inside.values()) - spent["likeness"])
    spent["all"] = sum(spent.values())
    return spent


def _encode(pipe: Any, order: Any) -> None:
    if not pipe.methods[0].speaks_text:
        encode_prompt(pipe.backbone, order.prompt)
        encode_negative(pipe.backbone, order.negative_prompt)


def _timed(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return (time.process_time() - begin) * 1000


@contextmanager
def _watched(networks: dict[str, Any]) -> Iterator[dict[str, float]]:
    """ms inside each network's forward, through torch's own hooks."""
    spent = dict.fromkeys(networks, 0.0)
    begun: dict[str, float] = {}
    handles = []
    for name, network in networks.items():

        def enter(*_: Any, name: str = name) -> None:
            begun[name] = time.process_time()

        def leave(*_: Any, name: str = name) -> None:
            spent[name] += (time.process_time() - begun[name]) * 1000

        handles += [network.register_forward_pre_hook(enter), network.register_forward_hook(leave)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()
