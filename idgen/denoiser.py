"""eps(x, t): the UNet, its ControlNets and all that a request attaches to them, as one function of latents and time.

What does not change between steps is computed on entering; on leaving, the models are as they were.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from idgen.adapters.attention import AttentionBank, AttentionState, Stream
from idgen.adapters.backends import kernels
from idgen.adapters.control import ControlRun
from idgen.adapters.lean import LeanBlocks
from idgen.adapters.remember import FeatureCache, Remembered
from idgen.conditioning import Conditioning, ControlBranch
from idgen.speed import Levers

Residuals = tuple[list[Tensor], Tensor]


class Denoiser:
    """A context manager. With guidance it computes 2 B rows, the unconditional half first, else B."""

    def __init__(
        self,
        unet: Any,
        conditioning: Conditioning,
        like: Tensor,
        *,
        guided: bool,
        attention: str,
        levers: Levers,
    ) -> None:
        """like: the latents (B, c, h, w), for their shape, device and dtype."""
        self.unet = unet
        self.conditioning = conditioning
        self.guided = guided
        self.attention = attention
        self.levers = levers
        self.like = like
        self.context, self.added = self._text()
        self.state = self._attention_state()
        self.residuals: Residuals | None = None
        """What the ControlNets added at the last step, summed over the branches, after scaling."""
        self._runs: list[tuple[ControlBranch, ControlRun]] = []
        self._features: FeatureCache | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Denoiser:
        with ExitStack() as stack:
            self._enter(stack)
            self._stack = stack.pop_all()
        return self

    def _enter(self, stack: ExitStack) -> None:
        stack.enter_context(kernels(self.attention))
        bank = stack.enter_context(AttentionBank(self.unet, self.state))
        if self.conditioning.reference is not None:
            self._record_reference(bank)
        bank.prepare(self.context)
        self._prepare_masks()
        if self.levers.run_lean:
            stack.enter_context(LeanBlocks(self.unet))
            if self.added is not None:
                stack.enter_context(Remembered(self.unet.add_embedding, self.unet.add_time_proj))
        if self.levers.cache_every > 1:
            self._features = stack.enter_context(FeatureCache(self.unet))
        for branch in self.conditioning.branches:
            if bool((branch.scale != 0).any()):
                self._runs.append((branch, stack.enter_context(self._control_run(branch))))

    def _prepare_masks(self) -> None:
        """Regions at every resolution of the UNet, beforehand: a compiled model must find them at its first call."""
        height, width = self.like.shape[-2:]
        for _ in self.unet.down_blocks:
            for index, stream in enumerate(self.state.streams):
                if stream.region is not None:
                    self.state.mask(index, stream, height * width)
            height, width = (height + 1) // 2, (width + 1) // 2

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._runs.clear()

    def __call__(self, x: Tensor, t: Tensor, step: int, steps: int) -> Tensor:
        """The UNet's output for the model input (B, c, h, w) at step ``step`` of ``steps``: (R, c, h, w)."""
        if self.levers.compile == "full":
            torch.compiler.cudagraph_mark_step_begin()
        rows = torch.cat([x, x]) if self.guided else x
        for stream, tokens in zip(self.state.streams, self.conditioning.streams):
            stream.active = tokens.start <= step / steps and (step + 1) / steps <= tokens.end
        fresh = self.levers.fresh(step) or self._features is None
        if self._features is not None:
            self._features.fresh = fresh
        if fresh or self.residuals is None:
            self.residuals = self._control(rows, t, step, steps)
        extra: dict[str, Any] = {}
        if self.residuals is not None:
            extra = {
                "down_block_additional_residuals": self.residuals[0],
                "mid_block_additional_residual": self.residuals[1],
            }
        eps = self.unet(rows, t, self.context, added_cond_kwargs=self.added, return_dict=False, **extra)[0]
        # The next replay of a CUDA graph writes over the last one's output; a callback may keep it.
        return eps.clone() if self.levers.compile == "full" else eps

    def _control(self, rows: Tensor, t: Tensor, step: int, steps: int) -> Residuals | None:
        total: Residuals | None = None
        if (step + 1) / steps > self.levers.structure_until:
            return None
        for branch, run in self._runs:
            if branch.keep(step, steps):
                down, mid = run.residuals(rows, t, self.added)
                total = (down, mid) if total is None else ([a + b for a, b in zip(total[0], down)], total[1] + mid)
        return total

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.like.device, self.like.dtype)

    def _both(self, positive: Tensor, negative: Tensor | None) -> Tensor:
        return self._to(torch.cat([negative, positive]) if self.guided and negative is not None else positive)

    def _text(self) -> tuple[Tensor, dict[str, Tensor] | None]:
        text = self.conditioning.text
        context = self._both(text.positive, text.negative)
        if text.pooled is None or text.time_ids is None:
            return context, None
        pooled = self._both(text.pooled, text.negative_pooled)
        return context, {"text_embeds": pooled, "time_ids": self._both(text.time_ids, text.time_ids)}

    def _attention_state(self) -> AttentionState:
        streams = []
        for stream in self.conditioning.streams:
            scale = stream.scale.repeat(2) if self.guided else stream.scale
            region = None if stream.region is None else self._to(stream.region)
            if region is not None and self.guided and len(region) > 1:
                region = region.repeat(2, 1, 1, 1)
            weights = stream.weights.to(self.like.device, self.like.dtype)
            tokens = self._both(stream.positive, stream.negative)
            streams.append(Stream(weights, tokens, self._to(scale).view(-1, 1, 1), region))
        loras = [lora.to(self.like.device, self.like.dtype) for lora in self.conditioning.loras]
        aspect = self.like.shape[-1] / self.like.shape[-2]
        return AttentionState(streams, loras, self.attention, aspect=aspect, lean=self.levers.run_lean)

    def _control_run(self, branch: ControlBranch) -> ControlRun:
        """In guess mode the branch acts on the conditional half only (ControlNet repository): 0 elsewhere."""
        half = self.guided and self.levers.structure_half
        twice = (lambda t: torch.cat([t, t])) if self.guided and not half else (lambda t: t)
        scale = twice(branch.scale).clone()
        if branch.guess_mode and self.guided and not half:
            scale[: len(branch.scale)] = 0
        if branch.positive is None:
            tokens = self.context[len(self.context) // 2 :] if half else self.context
        else:
            tokens = self._to(branch.positive) if half else self._both(branch.positive, branch.negative)
        return ControlRun(
            branch.model,
            self._to(twice(branch.image)),
            scale,
            tokens,
            branch.guess_mode,
            self.attention,
            half=half,
            lean=self.levers.run_lean,
        )

    def _record_reference(self, bank: AttentionBank) -> None:
        """One pass over the clean reference at t = 0; the loop's conditional rows then also attend to its features."""
        reference = self._to(self.conditioning.reference)  # type: ignore[arg-type]
        rows = len(reference)
        state = bank.state
        state.recording = True
        # Streams hold keys and values for the whole guided batch; this pass has only the conditional rows.
        streams, state.streams = state.streams, []
        late = None if self.added is None else {name: value[-rows:] for name, value in self.added.items()}
        self.unet(reference, torch.zeros((), device=reference.device), self.context[-rows:], added_cond_kwargs=late)
        state.streams = streams
        state.recording = False
        for processor in bank.processors:
            processor.forget_text()
        state.reference_rows = slice(rows, 2 * rows) if self.guided else slice(0, rows)
