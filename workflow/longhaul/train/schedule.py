"""Learning rate as a pure function of the step, so that a resume needs no state."""

from __future__ import annotations

import math

from longhaul.config.run_config import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """Rate of optimizer step `step` (0-based) of `steps`.

    Linear warm-up from peak / warmup_steps, so that no step is wasted at zero; then constant, cosine (Loshchilov and Hutter
    2017) or linear down to min_lr_ratio at the last step, or WSD (Hu et al. 2024, MiniCPM): constant, then a linear decay.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = schedule.min_lr_ratio
    return peak * (floor + (1.0 - floor) * _shape(schedule, step, steps))


def _shape(schedule: Schedule, step: int, steps: int) -> float:
    """1 at the peak, 0 at the floor."""
    if schedule.kind == "constant":
        return 1.0
    first = steps - schedule.decay_steps if schedule.kind == "wsd" else schedule.warmup_steps
    if step < first:
        return 1.0
    progress = (
        (step - first + 1) / max(1, steps - first)
        if schedule.kind == "wsd"
        else (step - first) / max(1, steps - 1 - first)
    )
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress


def may_grow(schedule: Schedule, trained_steps: int, planned_steps: int) -> bool:
    """Whether weights trained `trained_steps` under a plan of `planned_steps` may go on under a longer plan.

    Only where the rates so far would have been the same: constant, and WSD before its decay began.
    """
    if schedule.kind == "constant":
        return True
    return schedule.kind == "wsd" and trained_steps <= planned_steps - schedule.decay_steps
