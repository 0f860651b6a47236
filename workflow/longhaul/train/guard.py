"""Keeps non-finite gradients out of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch

from longhaul.errors import UserError


class TrainingFailure(UserError):
    """Training cannot go on, by no mistake in the config; says at which step, on which samples, and what to try."""

    exit_code = 1


class NonfiniteGuard:
    """Skips the optimizer step of a batch whose global gradient norm is not finite; weights and moments stay as they are.

    DeepSpeed does that for fp16 alone. The norm is reduced over all ranks before the step, so all of them skip alike.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._zero = hasattr(engine.optimizer, "optimizer")
        self._plain_norm = 0.0
        inner = engine.optimizer.optimizer if self._zero else engine.optimizer
        self._step = inner.step
        inner.step = self._guarded_step

    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        if not self._zero:
            return self._plain_norm
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def _guarded_step(self, *arguments: Any, **options: Any) -> Any:
        if math.isfinite(self._norm_before_step()):
            return self._step(*arguments, **options)
        return None

    def _norm_before_step(self) -> float:
        if self._zero:
            return float(self._engine.optimizer._global_grad_norm)
        return self._plain_norm

    def measure_plain(self) -> None:
        """ZeRO 0: the norm of the already averaged gradients, taken before DeepSpeed clips them."""
        if not self._zero:
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._plain_norm = float(torch.nn.utils.get_total_norm(gradients))
