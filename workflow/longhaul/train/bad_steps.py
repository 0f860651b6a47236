"""Keeps bad steps out of the weights: those whose loss or gradients are not finite, and spikes of the loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from longhaul.errors import UserError

_FEWEST_STEPS = 8


class TrainingFailure(UserError):
    """Training cannot go on, by no mistake in the config; says at which step, on which samples, and what to try."""

    exit_code = 1


def badness(loss: float, grad_norm: float, recent_losses: Sequence[float], spike_factor: float | None) -> str | None:
    """Why a step is bad; None when it is good. A spike is a loss above `spike_factor` times the recent losses' median."""
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        return f"loss {loss}, gradient norm {grad_norm}"
    if spike_factor is None or len(recent_losses) < _FEWEST_STEPS:
        return None
    usual = statistics.median(recent_losses)
    if loss <= spike_factor * usual:
        return None
    return f"loss {loss:.4g} is more than {spike_factor:g} times {usual:.4g}, the median of the last {len(recent_losses)} steps"


class StepGuard:
    """Judges every step before the optimizer takes it; of a bad one, weights and moments stay as they are.

    Loss and gradient norm are those of the global batch, so all ranks judge alike. DeepSpeed looks at fp16 alone: there it
    leaves out a step whose gradients overflow and lowers the loss scale, which is no bad step.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._zero = hasattr(engine.optimizer, "optimizer")
        self._plain_norm = 0.0
        inner = engine.optimizer.optimizer if self._zero else engine.optimizer
        self._step = inner.step
        inner.step = self._guarded_step
        self.judge: Callable[[float, float], str | None] = lambda loss, norm: badness(loss, norm, (), None)
        self._mean_loss: Callable[[], float] = lambda: math.nan
        self.loss: float | None = None
        self.reason: str | None = None

    def begin(self, mean_loss: Callable[[], float]) -> None:
        """A new step; mean_loss gives the global batch's when its forward passes are done, and every rank calls it."""
        self._mean_loss, self.loss, self.reason = mean_loss, None, None

    def finish(self) -> float:
        """The step's loss. The optimizer was not asked when DeepSpeed found an overflow: then the loss alone is judged."""
        if self.loss is None:
            self.loss = self._mean_loss()
            self.reason = self.judge(self.loss, 0.0)
        return self.loss

    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        if not self._zero:
            return self._plain_norm
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def _guarded_step(self, *arguments: Any, **options: Any) -> Any:
        # ZeRO asks once for every parameter group.
        if self.loss is None:
            self.loss = self._mean_loss()
            self.reason = self.judge(self.loss, self._norm_before_step())
        return None if self.reason else self._step(*arguments, **options)

    def _norm_before_step(self) -> float:
        if self._zero:
            return float(self._engine.optimizer._global_grad_norm)
        return self._plain_norm

    def measure_plain(self) -> None:
        """ZeRO 0: the norm of the already averaged gradients, taken before DeepSpeed clips them."""
        if not self._zero:
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._plain_norm = float(torch.nn.utils.get_total_norm(gradients))
