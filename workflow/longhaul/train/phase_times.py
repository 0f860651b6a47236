"""Measures the duration of steps, validations and saves: the longest step and validation, and the time since the last save."""

from __future__ import annotations

import time

STEP, VALIDATE, SAVE = "step", "validate", "save"
_EVENT_KEYS = {STEP: "training_s", VALIDATE: "validation_s", SAVE: "saving_s"}


class PhaseTimes:
    """Keeps the longest duration of each phase, and the time that each took since the last save."""

    def __init__(self) -> None:
        self.longest_s = dict.fromkeys(_EVENT_KEYS, 0.0)
        self._since_save_s = dict.fromkeys(_EVENT_KEYS, 0.0)

    @property
    def needed_for_step_s(self) -> float:
        """Return the time that another step and a validation may take, from the longest so far."""
        return 2 * self.longest_s[STEP] + self.longest_s[VALIDATE]

    def add(self, phase: str, seconds: float) -> None:
        """Add to a phase's time since the last save, but not to its longest duration."""
        self._since_save_s[phase] += seconds

    def finish(self, phase: str, started: float) -> float:
        """Record a phase that began at time.perf_counter() `started`; return its duration in seconds."""
        seconds = time.perf_counter() - started
        self.longest_s[phase] = max(self.longest_s[phase], seconds)
        self.add(phase, seconds)
        return seconds

    def pop_since_save(self) -> dict[str, float]:
        """Return the times since the last save, by their keys in the `saved` event, and reset them."""
        spent = {_EVENT_KEYS[phase]: round(seconds, 3) for phase, seconds in self._since_save_s.items()}
        self._since_save_s = dict.fromkeys(_EVENT_KEYS, 0.0)
        return spent
