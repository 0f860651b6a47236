"""Decides after a failed or stopped attempt: restart in place, requeue (preempted, time limit), quarantine a lost node, or fail.

Every decision exits this process with code 1, after the records are written.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from longhaul.artifacts.job_state import (
    CANCELLED,
    ENVIRONMENT,
    FINAL,
    NODE,
    PERMANENT,
    SIGNALLED,
    WALLTIME,
    Failure,
    this_host,
)
from longhaul.artifacts.quarantine import quarantined_nodes
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.scheduling import slurm_client
from longhaul.scheduling.allocation import Allocation
from longhaul.scheduling.job_records import JobRecords
from longhaul.scheduling.node_shortage import find_shortage
from longhaul.scheduling.termination_signals import TerminationSignals

_REQUEUE_TIMEOUT_S = 300.0
_RESUME_REMEDY = "run the same command again to resume"


class AllocationEnd:
    """The ways in which an allocation of a job ends before the job is done."""

    def __init__(
        self, job: LaunchSpec, allocation: Allocation, records: JobRecords, signals: TerminationSignals
    ) -> None:
        self._job, self._allocation, self._records, self._signals = job, allocation, records, signals

    def exit_unless_restartable(self, failure: Failure) -> None:
        """Exit if a restart in place is impossible: the failure is final, the allocation ends, or a node is lost."""
        if failure.failure_class in FINAL:
            self.fail(failure)
        if not self._job.slurm:
            self._fail_if_signalled(failure)
            return
        self._exit_if_slurm_ends_it(failure)
        if failure.failure_class == WALLTIME:
            self._exit_short_of_time(failure)
        self._requeue_without_bad_nodes(failure)
        lost = self._allocation.unresponsive_nodes()
        # Asked again: when Slurm takes an allocation away, none of its nodes responds.
        self._exit_if_slurm_ends_it(failure)
        if lost:
            self._requeue_without_lost_nodes(lost, failure)

    def _requeue_without_bad_nodes(self, failure: Failure) -> None:
        """Quarantine the nodes that a check found unfit, and requeue the job: Slurm gives it others."""
        bad = {node: failure.bad_nodes[node] for node in self._allocation.nodes if node in failure.bad_nodes}
        if bad:
            self._records.quarantine(bad)
            self.requeue(failure.cause, list(bad), failure.remedy)

    def _requeue_without_lost_nodes(self, lost: Sequence[str], failure: Failure) -> None:
        """Quarantine nodes that do not respond, and requeue the job. A failure of class `node` says what was seen of one."""
        reason, remedy = f"{', '.join(lost)} {'does' if len(lost) == 1 else 'do'} not respond", ""
        causes = dict.fromkeys(lost, "does not respond")
        if failure.failure_class == NODE:
            reason, remedy = f"{reason}; {failure.cause}", failure.remedy
            named = [node for node in lost if re.search(rf"\b{re.escape(node)}\b", failure.cause)]
            causes |= dict.fromkeys(named, f"does not respond; {failure.cause}")
        self._records.quarantine(causes)
        self.requeue(reason, lost, remedy)

    def exit_stopped_early(self, reason: str) -> NoReturn:
        """Exit after a training that saved and stopped on purpose."""
        if self._job.slurm and reason == SIGNALLED:
            self._exit_as_slurm_says(Failure(CANCELLED, reason, "", host=this_host()))
        self.requeue(reason)

    def fail_after_crashes(self, crashes: int, failure: Failure) -> NoReturn:
        """Fail after more crashes without a new checkpoint than recovery.max_restarts allows."""
        if self._job.max_restarts:
            cause = f"{crashes} crashes without a new checkpoint, the last one: {failure.cause}"
            remedy = failure.remedy or "read the job's log; then run the same command again"
            failure = replace(failure, failure_class=ENVIRONMENT, cause=cause, remedy=remedy)
        self.fail(failure)

    def requeue(self, reason: str, excluded: Sequence[str] = (), remedy: str = "") -> NoReturn:
        """Requeue this Slurm job, which Snakemake then sees as still active.

        If that is not allowed, leave the resubmission to Snakemake's retries.

        excluded: nodes that the job may not use again, for this reason
        remedy:   what helps against the reason, if too few nodes are left
        """
        listed = quarantined_nodes(Path(self._job.quarantine))
        all_excluded = [*listed, *(node for node in excluded if node not in listed)]
        if self._job.slurm:
            self._require_enough_nodes(excluded, reason, remedy)
        if not self._job.slurm or not self._job.requeue:
            self._leave_to_next_run(reason)
        self._records.write_end("waiting", reason)
        if refusal := slurm_client.requeue(str(self._allocation.job_id), all_excluded):
            self._leave_to_next_run(f"{reason}; Slurm refused to requeue the job: {refusal}")
        print(f"{self._job.name}: {reason}; job {self._allocation.job_id} is requeued", flush=True)
        self._wait_for_signal()

    def fail(self, failure: Failure) -> NoReturn:
        """Record the failure and exit."""
        print(self._records.write_failure(failure).as_text(), flush=True)
        sys.exit(1)

    def _fail_if_signalled(self, failure: Failure) -> None:
        if self._signals.received:
            self.fail(replace(failure, failure_class=CANCELLED, cause=self._signals.cause, remedy=_RESUME_REMEDY))

    def _exit_if_slurm_ends_it(self, failure: Failure) -> None:
        info = self._allocation.slurm_info()
        if self._signals.received or (info and info.state != "RUNNING"):
            self._exit_as_slurm_says(failure)

    def _exit_as_slurm_says(self, failure: Failure) -> NoReturn:
        """Exit with the cause that Slurm gives: a batch script gets SIGTERM for scancel, requeue and time limit alike."""
        info = self._allocation.slurm_info()
        if info and info.was_cancelled(self._allocation.restarts):
            cause = "cancelled by scancel"
            self.fail(replace(failure, failure_class=CANCELLED, cause=cause, remedy=_RESUME_REMEDY))
        if info and info.reached_time_limit:
            self._fail_at_time_limit(failure)
        down = self._allocation.down_nodes()
        self._records.quarantine(dict.fromkeys(down, "down while the job ran on it"))
        state = info.state if info else "cause unknown"
        lost = f": {', '.join(down)} {'is' if len(down) == 1 else 'are'} down" if down else ""
        self._leave_to_next_run(f"Slurm ended the allocation ({state}){lost}")

    def _exit_short_of_time(self, failure: Failure) -> NoReturn:
        """Exit when the allocation is too short for another restart; requeue if it has saved something."""
        if self._records.newest_step() > self._records.step_at_start:
            self.requeue("the allocation ends")
        self._fail_at_time_limit(failure)

    def _fail_at_time_limit(self, failure: Failure) -> NoReturn:
        """Fail at the end of the allocation; permanently if two allocations in a row have saved nothing."""
        cause = (
            failure.cause if failure.failure_class == WALLTIME else "the allocation ended before a checkpoint was saved"
        )
        saved_nothing = self._records.newest_step() == self._records.step_at_start
        if self._records.failed_the_same_way(WALLTIME) and saved_nothing:
            remedy = "raise minutes, or save more often (checkpoints.every_steps)"
            self.fail(replace(failure, failure_class=PERMANENT, cause=f"{cause}, twice in a row", remedy=remedy))
        self.fail(replace(failure, failure_class=WALLTIME, cause=cause))

    def _require_enough_nodes(self, excluded: Sequence[str], reason: str, remedy: str) -> None:
        """Fail if too few nodes are left: Slurm would refuse the job. The arguments are those of `requeue`."""
        shortage = find_shortage(self._allocation.partition, self._job.nodes, Path(self._job.quarantine), excluded)
        if shortage:
            cause, remedy = shortage.after(reason, remedy)
            self.fail(Failure(ENVIRONMENT, cause, remedy, host=this_host()))

    def _wait_for_signal(self) -> NoReturn:
        """Exit when Slurm sends SIGTERM. A job that exits before it is requeued would count as failed."""
        deadline = time.monotonic() + _REQUEUE_TIMEOUT_S
        while self._signals.received is None and time.monotonic() < deadline:
            time.sleep(0.2)
        sys.exit(1)

    def _leave_to_next_run(self, reason: str) -> NoReturn:
        self._records.write_end("waiting", reason)
        print(f"{self._job.name}: {reason}; {_RESUME_REMEDY}", flush=True)
        sys.exit(1)
