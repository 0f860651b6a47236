"""Detection of bad steps, before the optimizer applies them: loss or gradient norm not finite, or a spike of the loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from longhaul.compat.deepspeed import gradient_norm_before_update, has_wrapped_optimizer, wrap_optimizer_step

_MIN_RECENT_LOSSES = 8
"""Fewer recent losses than this give no reliable median; the first steps of a stage have no spikes."""

Step = Callable[..., Any]
FindProblem = Callable[[float, float], str | None]
"""(loss, gradient norm) -> why the step is bad, or None."""


def bad_step_reason(
    loss: float, grad_norm: float, recent_losses: Sequence[float], spike_factor: float | None
) -> str | None:
    """Return why a step is bad; None when it is good.

    A spike is a loss above `spike_factor` times the median of the recent losses; None looks for no spikes.
    """
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        return f"loss {loss}, gradient norm {grad_norm}"
    if spike_factor is None or len(recent_losses) < _MIN_RECENT_LOSSES:
        return None
    median = statistics.median(recent_losses)
    if loss <= spike_factor * median:
        return None
    return f"loss {loss:.4g} is more than {spike_factor:g} times {median:.4g}, the median of the last {len(recent_losses)} steps"


class BadStepFilter:
    """Examines every step before the optimizer applies it, and leaves weights and moments unchanged where it is bad.

    Loss and gradient norm are those of the global batch, so all ranks come to the same result. DeepSpeed checks fp16 alone: it
    drops a step whose gradients overflow and lowers the loss scale, which does not count as a bad step here.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._is_wrapped = has_wrapped_optimizer(engine)
        self._unwrapped_norm = 0.0
        self.find_problem: FindProblem = lambda loss, norm: bad_step_reason(loss, norm, (), None)
        self._mean_loss: Callable[[], float] = lambda: math.nan
        self.loss: float | None = None
        self.reason: str | None = None
        wrap_optimizer_step(engine, self._filtered)

    def begin(self, mean_loss: Callable[[], float]) -> None:
        """Begin a step. `mean_loss` returns the global batch's loss after its forward passes; every rank calls it."""
        self._mean_loss, self.loss, self.reason = mean_loss, None, None

    def finish(self) -> float:
        """Return the step's loss; `reason` then holds why the step is bad, or None.

        When DeepSpeed finds an overflow, it does not call the optimizer. Then the loss alone is examined.
        """
        if self.loss is None:
            self.loss = self._mean_loss()
            self.reason = self.find_problem(self.loss, 0.0)
        return self.loss

    def grad_norm(self) -> float:
        """Return the global gradient norm of the last step, before clipping."""
        if not self._is_wrapped:
            return self._unwrapped_norm
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def measure_unwrapped_norm(self) -> None:
        """Measure the norm of the averaged gradients before clipping, at ZeRO 0, where no ZeRO optimizer measures it."""
        if not self._is_wrapped:
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._unwrapped_norm = float(torch.nn.utils.get_total_norm(gradients))

    def _filtered(self, step: Step) -> Step:
        def filtered_step(*arguments: Any, **options: Any) -> Any:
            if self.loss is None:  # ZeRO calls this once for each parameter group
                self.loss = self._mean_loss()
                self.reason = self.find_problem(self.loss, self._norm_before_update())
            return None if self.reason else step(*arguments, **options)

        return filtered_step

    def _norm_before_update(self) -> float:
        return gradient_norm_before_update(self._engine) if self._is_wrapped else self._unwrapped_norm
