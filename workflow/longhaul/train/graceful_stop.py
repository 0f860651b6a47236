"""Decides after each step whether to save and stop: time limit near (stop_margin_s), preempted, SIGTERM; writes outcome.json."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from longhaul.artifacts.job_state import SIGNALLED, Outcome, read_deadline
from longhaul.artifacts.paths import JobFolder
from longhaul.errors import AllocationTooShort
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.delayed_sum import DelayedSum
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.phase_times import STEP, VALIDATE, PhaseTimes

_WALLTIME, _PREEMPTED, _SIGNAL = 1, 2, 3
_REASONS = {_WALLTIME: "the allocation ends", _PREEMPTED: "preempted", _SIGNAL: SIGNALLED}
_READ_EVERY_S = 1.0
_STEPS, _SAVES, _SAVES_WHILE_SAVING = 2.0, 1.5, 3.0
"""Multiples of the longest step and save so far for which time must be left: file systems slow down."""


def needed_to_leave_s(times: PhaseTimes, longest_save_s: float, is_saving: bool) -> float:
    """Return the time that another step, a validation and a save on the disk may take, from the longest so far.

    longest_save_s: of all attempts
    is_saving:      whether an earlier save must finish first
    """
    saves = _SAVES_WHILE_SAVING if is_saving else _SAVES
    return _STEPS * times.longest_s[STEP] + times.longest_s[VALIDATE] + saves * longest_save_s


class GracefulStop:
    """Decides after each step whether to leave. Rank 0 reads deadline.json, every rank handles SIGTERM, all decide alike."""

    def __init__(self, job: TrainSpec, context: DistributedContext) -> None:
        self._folder, self._margin_s, self._context = Path(job.folder), job.stage.recovery.stop_margin_s, context
        self._got_sigterm, self._preempted = False, False
        self._end_s: float | None = None
        self._read_at = -_READ_EVERY_S
        self._votes = DelayedSum(context)
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def reason(self, needed_s: float) -> str:
        """Return why to leave now, else "". Every rank calls this.

        needed_s: time that another step and a save may take
        """
        own = _SIGNAL * self._got_sigterm
        if self._context.is_main:
            own = self._deadline_reason(needed_s) or own
        if not self._votes.next(own):
            return ""
        return self._context.broadcast(_REASONS.get(own, _REASONS[_SIGNAL]))

    def require_time_for(self, needed_s: float) -> None:
        """Raise AllocationTooShort on every rank if the rest of the allocation is too short for a step and a save.

        needed_s: time that a step, a validation and a save may take, from earlier ones; rank 0's counts. Every rank calls this.
        """
        left_s = None
        if self._context.is_main:
            self._read_deadline()
            left_s = None if self._end_s is None else self._end_s - time.time()
        left_s, needed_s = self._context.broadcast((left_s, needed_s))
        if left_s is not None and left_s < needed_s + self._margin_s:
            raise AllocationTooShort(
                f"the allocation ends in {left_s:.0f} s; a step, a validation and a save take {needed_s:.0f} s, and "
                f"recovery.stop_margin_s is {self._margin_s:g}: no step of this allocation could be saved",
                "give the stage more minutes, or lower recovery.stop_margin_s",
            )

    def leave(self, reason: str, step: int) -> None:
        """Write outcome.json, after everything is saved; every rank calls this."""
        self._context.barrier()
        if self._context.is_main:
            print(f"left after step {step}: {reason}", flush=True)
            Outcome(reason, step).write(JobFolder(self._folder).outcome)
        self._context.barrier()

    def _deadline_reason(self, needed_s: float) -> int:
        self._read_deadline()
        if self._preempted:
            return _PREEMPTED
        is_due = self._end_s is not None and time.time() + needed_s + self._margin_s >= self._end_s
        return _WALLTIME * is_due

    def _read_deadline(self) -> None:
        if time.monotonic() - self._read_at < _READ_EVERY_S and not self._got_sigterm:
            return
        self._read_at = time.monotonic()
        if deadline := read_deadline(self._folder):
            self._end_s, self._preempted = deadline.end_s, deadline.preempted

    def _on_sigterm(self, *_: object) -> None:
        self._got_sigterm = True
