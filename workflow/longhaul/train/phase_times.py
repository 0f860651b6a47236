"""Measures durations: of the phases of a start (imports, rendezvous, model, engine, first step), of steps, validations, saves.

Keeps the longest step and validation, and the times since the last save.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from longhaul.artifacts.line_record_fields import START_UP_PHASES

STEP, VALIDATE, SAVE = "step", "validate", "save"
_EVENT_KEYS = {STEP: "training_s", VALIDATE: "validation_s", SAVE: "saving_s"}


class PhaseTimes:
    """Keeps the longest duration of each phase, and the time that each took since the last save."""

    def __init__(self) -> None:
        self.longest_s = dict.fromkeys(_EVENT_KEYS, 0.0)
        self._since_save_s = dict.fromkeys(_EVENT_KEYS, 0.0)

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
        spent = {_EVENT_KEYS[phase]: seconds for phase, seconds in self._since_save_s.items()}
        self._since_save_s = dict.fromkeys(_EVENT_KEYS, 0.0)
        return spent


class StartUpTimes:
    """Divides the time from the start of this process to the end of its first step into START_UP_PHASES."""

    def __init__(self) -> None:
        """End the first phase, the imports: they are over when this is called."""
        self._finished: dict[str, float] = {}
        self._phase_began = time.perf_counter() - process_age_s()
        self.finish("imports")

    def finish(self, phase: str) -> None:
        """End a phase, which began when the one before ended."""
        now = time.perf_counter()
        self._finished[phase] = now - self._phase_began
        self._phase_began = now

    @property
    def is_complete(self) -> bool:
        return "first_step" in self._finished

    def seconds(self) -> dict[str, float]:
        """Return each phase's duration in seconds, under its key in the `start_up` event."""
        return {f"{phase}_s": round(self._finished.get(phase, 0.0), 3) for phase in START_UP_PHASES}

    def __str__(self) -> str:
        phases = ", ".join(
            f"{phase.replace('_', ' ')} {self._finished.get(phase, 0.0):.1f}" for phase in START_UP_PHASES
        )
        return f"first step {sum(self._finished.values()):.1f} s after the start of the process: {phases}"


def process_age_s() -> float:
    """Return the seconds since this process was started; field 22 of proc_pid_stat(5) counts clock ticks since boot."""
    after_name = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
