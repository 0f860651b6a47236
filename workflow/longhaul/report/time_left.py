"""Adds up the time that the trainings of a run still take: measured (stage_records.py), like another stage, or as planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class StageWork:
    """Speed and amount of work of a stage's training.

    seconds_left: for the steps that are left, at the speed of the last ones; 0 if the stage is done; None before its first step
    step_s:       measured time of a step
    flops:        of all steps, by the plan
    gpu_hours:    lowest and highest estimate of the plan
    """

    ranks: int
    steps: int | None
    seconds_left: float | None
    step_s: float | None
    flops: float | None
    gpu_hours: tuple[float, float] | None

    @property
    def flops_per_rank_and_s(self) -> float | None:
        """Return the measured speed; None before the first steps, or where the plan has no number of FLOPs."""
        if not (self.flops and self.steps and self.step_s and self.ranks):
            return None
        return self.flops / self.steps / self.step_s / self.ranks


def training_left_s(stages: Sequence[StageWork]) -> tuple[float, float] | None:
    """Return the least and the most seconds that the steps of all stages still take, one stage after the other.

    None: nothing tells how long one of the stages takes.
    """
    speeds = [speed for stage in stages if (speed := stage.flops_per_rank_and_s)]
    spans = [_seconds(stage, speeds[-1] if speeds else None) for stage in stages]
    known = [span for span in spans if span is not None]
    return (sum(low for low, _ in known), sum(high for _, high in known)) if len(known) == len(spans) else None


def _seconds(stage: StageWork, speed: float | None) -> tuple[float, float] | None:
    """Return the seconds of one stage. speed: of another stage, which trains the same model"""
    if stage.seconds_left is not None:
        return stage.seconds_left, stage.seconds_left
    if speed and stage.flops and stage.ranks:
        seconds = stage.flops / stage.ranks / speed
        return seconds, seconds
    if stage.gpu_hours and stage.ranks:
        low, high = (hours * _SECONDS_PER_HOUR / stage.ranks for hours in stage.gpu_hours)
        return low, high
    return None
