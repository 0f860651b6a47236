"""Supervises one job on its first node: repeats attempts after a crash (at most max_restarts without a new checkpoint).

| what happens                                    | what the supervisor does                                     |
| a process crashes                               | restarts the steps in the same allocation                    |
| a node does not respond                         | quarantines the node and requeues the job without it         |
| a training stops at the end of its allocation   | requeues the job                                             |
| a failure would happen again                    | writes failure.json and exits                                |
| without Slurm, `longhaul run` is killed         | ends the steps with SIGTERM, so that they save               |
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import psutil

from longhaul.artifacts.job_state import Outcome, State
from longhaul.artifacts.leases import Lease, LeaseOwner
from longhaul.artifacts.paths import RunPaths
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.scheduling import slurm_client
from longhaul.scheduling.allocation import Allocation, join_allocation
from longhaul.scheduling.deadline_updater import DeadlineUpdater
from longhaul.scheduling.decide_after_attempt import AllocationEnd
from longhaul.scheduling.job_records import JobRecords
from longhaul.scheduling.run_job_steps import StepRunner
from longhaul.scheduling.termination_signals import TerminationSignals


def run(job: LaunchSpec) -> None:
    """Run a job to its end.

    Raises:
        SystemExit: with code 1 if the job is not done; the cause is printed and recorded.
        UserError:  the allocation is not the planned one.
    """
    Supervisor(job).run()


class Supervisor:
    """The supervisor of one job."""

    def __init__(self, job: LaunchSpec) -> None:
        self.job = job
        self.records = JobRecords(job)
        self.signals = TerminationSignals(self._on_signal)
        self.deadline: DeadlineUpdater | None = None
        self.steps: StepRunner | None = None

    def run(self) -> None:
        """Run the job in this allocation until it is done; SystemExit(1) if it is not."""
        self._refuse_known_failure()
        allocation = join_allocation(self.job)
        earlier = self.records.begin(allocation)
        self._quarantine_down_nodes(earlier)
        self.records.write_running()
        main_process = None if self.job.slurm else _main_process_above(self.job.run)
        steps = StepRunner(self.job, allocation, self.records.allocation_number, self.signals, main_process)
        end = AllocationEnd(self.job, allocation, self.records, self.signals)
        self.steps = steps
        with self.signals, self._deadline_updates(allocation) as self.deadline:
            self._run_attempts(steps, end)
        self.records.write_end("done")

    def _refuse_known_failure(self) -> None:
        if failure := self.records.known_failure():
            name = self.job.name
            print(f"{name} failed at {failure.time} and would only fail again:\n{failure.as_text()}", flush=True)
            print(f"  to retry it without a change: longhaul retry {self.job.folder}", flush=True)
            sys.exit(1)

    def _quarantine_down_nodes(self, earlier: State | None) -> None:
        """Quarantine nodes that went down while an earlier allocation ran, so that its supervisor could not do it."""
        if self.job.slurm and earlier and earlier.state == "running":
            down = slurm_client.down_nodes(earlier.nodes)
            self.records.quarantine(dict.fromkeys(down, "down after the job ran on it"))

    def _run_attempts(self, steps: StepRunner, end: AllocationEnd) -> None:
        """Run the steps until they succeed; restart them in place after a crash."""
        crashes, newest_step = 0, self.records.newest_step()
        while (ended := steps.run_attempt()) is not None:
            if isinstance(ended, Outcome):
                end.exit_stopped_early(ended.reason)
            end.exit_unless_restartable(ended)
            crashes = 1 if self.records.newest_step() > newest_step else crashes + 1
            newest_step = self.records.newest_step()
            if crashes > self.job.max_restarts:
                end.fail_after_crashes(crashes, ended)
            limit = self.job.max_restarts
            print(f"{ended.as_text()}\nrestarted in place ({crashes} of {limit} without progress)", flush=True)
            self.records.append_event("restarted", ended.cause)

    def _deadline_updates(self, allocation: Allocation) -> AbstractContextManager[DeadlineUpdater | None]:
        if not self.job.slurm:
            return nullcontext()
        return DeadlineUpdater(str(allocation.job_id), Path(self.job.folder), self.job.deadline_poll_interval_s)

    def _on_signal(self) -> None:
        """Make trainers stop: under Slurm through deadline.json, which now shows a preemption, else by SIGTERM."""
        if self.deadline:
            self.deadline.refresh_now()
        elif self.steps:
            self.steps.terminate()


def _main_process_above(run: str) -> LeaseOwner | None:
    """Return the main process of the run if it has started this process; None for a job that a user has started."""
    owner = Lease(RunPaths(run).lease).current_owner()
    above = {process.pid for process in psutil.Process().parents()}
    return owner if owner and owner.is_on_this_host and owner.pid in above else None
