"""Detects bad steps before the optimizer applies them: loss or gradient norm is NaN or infinite, or a loss spike; clips
gradients.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from longhaul.compat.deepspeed import (
    Engine,
    gradient_norm_before_update,
    has_wrapped_optimizer,
    inner_optimizer,
    measure_norm_in_fp32,
    take_over_clipping,
    wrap_optimizer_step,
)
from longhaul.compat.deepspeed_optimizer_step import can_update_in_one_pass, update_in_one_pass
from longhaul.compat.torch import can_skip_update_on_device, set_update_scale
from longhaul.train.adamw_in_one_pass import adamw_in_one_pass, is_compiled

SPIKE_WINDOW_STEPS = 64
"""Number of losses with whose median a loss is compared."""
_MIN_RECENT_LOSSES = 8
"""Fewer recent losses than this give no reliable median; the first steps of a stage have no spikes."""

Step = Callable[..., object]
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


@dataclass(frozen=True)
class Examined:
    """Loss and gradient norm of a step, and whether the step is bad: scalars in fp64 on the device.

    `is_bad` is 1 also for a step after a bad one that the CPU has not noticed yet: see `DeviceBadStepFilter`.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    is_bad: torch.Tensor


def build_bad_step_filter(engine: Engine, waits_for_result: bool) -> BadStepFilter:
    """Return a filter that decides on the device, where the optimizer allows it; one that decides on the CPU elsewhere.

    waits_for_result: something on the CPU needs the result of a step before the next one, such as the median of all losses
    """
    on_device = has_wrapped_optimizer(engine) and not engine.fp16_enabled() and not waits_for_result
    if on_device and can_skip_update_on_device(inner_optimizer(engine)):
        return DeviceBadStepFilter(engine)
    return BadStepFilter(engine)


class BadStepFilter:
    """Examines every step before the optimizer applies it, and leaves weights and moments unchanged where it is bad.

    Loss and gradient norm are those of the global batch, so all ranks come to the same result. DeepSpeed checks fp16 alone: it
    drops a step whose gradients overflow and lowers the loss scale, which does not count as a bad step here.
    """

    is_delayed = False
    """True if the CPU reads the result of a step only after it has started the next one."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_wrapped = has_wrapped_optimizer(engine)
        self._unwrapped_norm = torch.zeros(())
        self.find_problem: FindProblem = lambda loss, norm: bad_step_reason(loss, norm, (), None)
        self._mean_loss: Callable[[], torch.Tensor] = lambda: torch.tensor(math.nan)
        self._examined: Examined | None = None
        wrap_optimizer_step(engine, self._filtered)

    def begin(self, mean_loss: Callable[[], torch.Tensor]) -> None:
        """Begin a step. `mean_loss` returns the global batch's loss after its forward passes; every rank calls it."""
        self._mean_loss, self._examined = mean_loss, None

    def finish(self) -> Examined:
        """Return what was found out about the step.

        When DeepSpeed finds gradients that are not finite, it does not call the optimizer. In fp16 that is no bad step, and
        the loss alone is examined.
        """
        if self._examined is None:
            lost = 0.0 if self._engine.fp16_enabled() else math.inf
            self._examined = self._examine(torch.tensor(lost, dtype=torch.float64))
        return self._examined

    def acknowledge(self) -> None:
        """Continue after a bad step: its consequences have been drawn."""

    def grad_norm(self, examined: Examined) -> torch.Tensor:
        """Return the global gradient norm of the finished step before clipping, as metrics show it."""
        if not self._is_wrapped:
            return examined.grad_norm
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(math.nan if norm is None else norm, dtype=torch.float64)

    def measure_unwrapped_norm(self) -> None:
        """Measure the norm of the averaged gradients before clipping, at ZeRO 0, where no ZeRO optimizer measures it."""
        if not self._is_wrapped:
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._unwrapped_norm = torch.nn.utils.get_total_norm(gradients)

    def _filtered(self, step: Step) -> Step:
        def filtered_step(*arguments: object, **options: object) -> object:
            if self._examined is None:  # ZeRO calls this once for each parameter group
                self._examined = self._examine(self._norm_before_update())
            return self._apply(step, arguments, options)

        return filtered_step

    def _apply(self, step: Step, arguments: tuple[object, ...], options: dict[str, object]) -> object:
        return None if self._examined is None or self._examined.is_bad else step(*arguments, **options)

    def _examine(self, norm: torch.Tensor) -> Examined:
        loss = self._mean_loss()
        problem = self.find_problem(loss.item(), norm.item())
        return Examined(loss, norm, torch.tensor(float(problem is not None), dtype=torch.float64))

    def _norm_before_update(self) -> torch.Tensor:
        norm = gradient_norm_before_update(self._engine) if self._is_wrapped else self._unwrapped_norm
        return torch.as_tensor(norm, dtype=torch.float64)


class DeviceBadStepFilter(BadStepFilter):
    """Decides on the device, so that the CPU never waits for a step: the GPU always has the next one in its queue.

    The optimizer's kernel reads the decision and the factor of clipping. The CPU reads the result of a step when it has started
    the next one. Therefore a step after a bad one changes nothing either, until the CPU has drawn the consequences: it may
    belong to another batch or have another learning rate then.
    """

    is_delayed = True

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._largest_norm = take_over_clipping(engine)
        measure_norm_in_fp32(engine)
        self._unnoticed: torch.Tensor | None = None
        if can_update_in_one_pass(engine) and is_compiled(inner_optimizer(engine)):
            update_in_one_pass(engine, self._update)

    def finish(self) -> Examined:
        examined = super().finish()
        self._unnoticed = examined.is_bad
        return examined

    def acknowledge(self) -> None:
        self._unnoticed = None

    def grad_norm(self, examined: Examined) -> torch.Tensor:
        return examined.grad_norm

    def _examine(self, norm: torch.Tensor) -> Examined:
        loss = self._mean_loss()
        norm = norm.to(loss.device, non_blocking=True)
        is_bad = (~(torch.isfinite(loss) & torch.isfinite(norm))).double()
        if self._unnoticed is not None:
            is_bad = torch.maximum(is_bad, self._unnoticed)
        return Examined(loss, norm, is_bad)

    def _apply(self, step: Step, arguments: tuple[object, ...], options: dict[str, object]) -> object:
        divisor, is_bad = self._decision()
        set_update_scale(inner_optimizer(self._engine), divisor, is_bad)
        return step(*arguments, **options)

    def _update(self, group: int, master: torch.Tensor, gradient: torch.Tensor, weights: torch.Tensor) -> None:
        """Update a part of this rank's partition, in the place of the inner optimizer's `step`."""
        if self._examined is None:
            self._examined = self._examine(self._norm_before_update())
        optimizer = inner_optimizer(self._engine)
        settings, state = optimizer.param_groups[group], optimizer.state[master]
        adamw_in_one_pass(settings, state, master, gradient, weights, *self._decision())

    def _decision(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return (the number by which clipping divides gradients, 1 if the step is bad else 0): scalars in fp32."""
        examined = self._examined
        assert examined is not None
        is_bad = examined.is_bad.float()
        if not self._largest_norm:
            return None, is_bad
        return ((examined.grad_norm + 1e-6) / self._largest_norm).clamp(min=1.0).float(), is_bad
