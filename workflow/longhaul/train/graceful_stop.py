"""Leaving in time: a training that must end saves after its step, and says so, instead of being cut off."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from longhaul.artifacts.job_state import SIGNALLED, Outcome, read_deadline
from longhaul.errors import AllocationTooShort
from longhaul.jobs.specs import TrainSpec
from longhaul.train.distributed_context import DistributedContext

_WALLTIME, _PREEMPTED, _SIGNAL = 1, 2, 3
_REASONS = {_WALLTIME: "the allocation ends", _PREEMPTED: "preempted", _SIGNAL: SIGNALLED}
_READ_EVERY_S = 1.0


class Stopping:
    """Whether to leave after this step; rank 0 reads deadline.json, every rank hears of SIGTERM, all of them decide alike."""

    def __init__(self, job: TrainSpec, processes: DistributedContext) -> None:
        self._folder, self._lead_s, self._processes = Path(job.folder), job.stage.recovery.stop_margin_s, processes
        self._terminated, self._read_at, self._end_s, self._preempted = False, -_READ_EVERY_S, None, False
        signal.signal(signal.SIGTERM, self._note)

    def reason(self, last_save_s: float) -> str:
        """Why to leave now, else ""; `last_save_s` is what the rest of a step and a save may take. A collective."""
        own = _SIGNAL * self._terminated
        if self._processes.is_main:
            own = self._seen(last_save_s) or own
        if not self._processes.sum(own):
            return ""
        return self._processes.broadcast(_REASONS.get(own, _REASONS[_SIGNAL]))

    def require_time_for(self, leaving_takes_s: float) -> None:
        """Refuses an allocation in which nothing could be saved; `leaving_takes_s` is what earlier saves took. A collective.

        Raises AllocationTooShort on every rank.
        """
        left_s = None
        if self._processes.is_main:
            self._read()
            left_s = None if self._end_s is None else self._end_s - time.time()
        left_s = self._processes.broadcast(left_s)
        if left_s is not None and left_s < leaving_takes_s + self._lead_s:
            raise AllocationTooShort(
                f"the allocation ends in {left_s:.0f} s; a step, a validation and a save take {leaving_takes_s:.0f} s here, "
                f"and recovery.stop_margin_s is {self._lead_s:g}: nothing that is trained in it could be saved",
                "give the stage more minutes, or lower recovery.stop_margin_s",
            )

    def leave(self, reason: str, step: int) -> None:
        """Rank 0 writes outcome.json, when everything is saved."""
        self._processes.barrier()
        if self._processes.is_main:
            print(f"left after step {step}: {reason}", flush=True)
            Outcome(reason, step).write(self._folder / "outcome.json")
        self._processes.barrier()

    def _seen(self, last_save_s: float) -> int:
        self._read()
        if self._preempted:
            return _PREEMPTED
        ends = self._end_s is not None and time.time() + last_save_s + self._lead_s >= self._end_s
        return _WALLTIME * ends

    def _read(self) -> None:
        if time.monotonic() - self._read_at < _READ_EVERY_S and not self._terminated:
            return
        self._read_at = time.monotonic()
        if deadline := read_deadline(self._folder):
            self._end_s, self._preempted = deadline.end_s, deadline.preempted

    def _note(self, *_: object) -> None:
        self._terminated = True
