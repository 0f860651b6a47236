"""Computes the learning rate of a step: warm-up, cosine, linear or WSD decay, min_lr_ratio."""

from __future__ import annotations

import math

from longhaul.config.schedule_config import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """Return the rate of optimizer step `step` (0-based) of `steps`.

    A linear warm-up from peak / warmup_steps, so that the first step trains. Then constant, cosine (Loshchilov and Hutter 2017)
    or linear down to min_lr_ratio at the last step, or WSD (Hu et al. 2024, MiniCPM): constant, then a linear decay.
    """
    schedule = schedule.in_steps(steps)
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    lowest = schedule.min_lr_ratio
    return peak * (lowest + (1.0 - lowest) * _decay_factor(schedule, step, steps))


def _decay_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Return 1 at the peak and 0 at the lowest rate."""
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


def can_extend_steps(schedule: Schedule, trained_steps: int, planned_steps: int) -> bool:
    """Return whether weights with `trained_steps` of `planned_steps` may continue under a longer plan.

    They may where the rates so far would have been the same: constant, and WSD before its decay begins. A warm-up that is a
    share of the steps would have been longer.
    """
    if isinstance(schedule.warmup_steps, float):
        return False
    if schedule.kind == "constant":
        return True
    return schedule.kind == "wsd" and trained_steps <= planned_steps - schedule.in_steps(planned_steps).decay_steps
