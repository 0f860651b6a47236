"""Starts the steps of one attempt (srun or local processes, MASTER_PORT), stops them by SIGTERM, after 300 s by
SIGKILL; returns the first failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil

from longhaul.artifacts.job_state import (
    TRANSIENT,
    Failure,
    Outcome,
    clear_attempt,
    rank_failures,
    read_outcome,
    this_host,
)
from longhaul.artifacts.leases import LeaseOwner
from longhaul.artifacts.paths import AttemptLogs
from longhaul.jobs.environment_variables import COLLECTIVE_RECORDS
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.runtime.launcher_variables import without_launcher
from longhaul.runtime.process_tree import adopt_orphans, kill_descendants, signal_at_end_of_parent
from longhaul.scheduling.allocation import Allocation
from longhaul.scheduling.master_address import master_address
from longhaul.scheduling.termination_signals import TerminationSignals

_FIRST_PORT, _PORTS = 20000, 12000
"""Range of MASTER_PORT: below Linux's ephemeral ports, which begin at 32768."""
STOP_S = 300
"""Seconds that a step on this machine gets after SIGTERM, to save and end. Under Slurm, KillWait and GraceTime say it."""
_TORCHRUN_MARGIN_S = 10
_LOOK_EVERY_S = 1.0


class StepRunner:
    """Runs a job's steps in one allocation.

    main_process: the process of `longhaul run` that the steps end with; None under Slurm and for a job that a user starts
    """

    def __init__(
        self,
        job: LaunchSpec,
        allocation: Allocation,
        allocation_number: int,
        signals: TerminationSignals,
        main_process: LeaseOwner | None = None,
    ) -> None:
        self._job, self._allocation, self._allocation_number = job, allocation, allocation_number
        self._signals, self._main_process = signals, main_process
        self._started_steps = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._terminated_s: float | None = None

    def run_attempt(self) -> Failure | Outcome | None:
        """Run the steps in order.

        Return None when all have succeeded, an Outcome when the job stopped early on purpose, or the first failure.
        """
        folder = Path(self._job.folder)
        clear_attempt(folder)
        with self._attempt_log() as log:
            for step in self._job.steps:
                code = self._run_command(list(step.command), log)
                if outcome := read_outcome(folder):
                    return outcome
                if code:
                    reported = rank_failures(folder)
                    return reported[0] if reported else _unreported_failure(step.title, code)
        return None

    @contextmanager
    def _attempt_log(self) -> Iterator[BinaryIO | None]:
        """Yield the log of a new attempt. None: the steps print where this process prints, to a terminal or on a full disk."""
        stream = None if sys.stdout.isatty() else _new_log(AttemptLogs(Path(self._job.attempt_logs)))
        if stream:
            nodes = ", ".join(self._allocation.nodes)
            job = f"job {self._allocation.job_id} on {nodes}" if self._job.slurm else f"on {nodes}"
            print(f"{self._job.name}, {job}: what this attempt prints is in {stream.name}", flush=True)
        try:
            yield stream
        finally:
            if stream:
                stream.close()

    def terminate(self) -> None:
        """Send SIGTERM to the running step's processes. Under Slurm this does nothing, because Slurm sends it.

        It is sent once: torchrun does not wait until its ranks have saved when it gets another one.
        """
        if self._process and not self._job.slurm and self._terminated_s is None:
            self._terminated_s = time.monotonic()
            with suppress(ProcessLookupError):  # the step has just ended
                os.killpg(self._process.pid, signal.SIGTERM)

    def _run_command(self, command: list[str], log: BinaryIO | None) -> int:
        self._terminated_s = None
        others = frozenset() if self._job.slurm else _children()
        with subprocess.Popen(
            command,
            env=self._environment(log),
            start_new_session=not self._job.slurm,
            preexec_fn=None if self._job.slurm else _end_with_supervisor,  # noqa: PLW1509  # without Slurm, there is one thread
            stdout=log,
            stderr=subprocess.STDOUT if log else None,
        ) as process:
            self._process = process
            if self._signals.received:  # the signal may have come before self._process was set
                self.terminate()
            code = process.wait() if self._job.slurm else self._wait_on_this_machine(process, others)
        self._process = None
        return code

    def _wait_on_this_machine(self, process: subprocess.Popen[bytes], others: frozenset[int]) -> int:
        """Wait until a step has ended, kill what it leaves, and return its exit code.

        others: children of this process that are not of the step
        """
        code = None
        while code is None:
            try:
                code = process.wait(_LOOK_EVERY_S)
            except subprocess.TimeoutExpired:
                if self._terminated_s is None:
                    if self._main_process and self._main_process.is_dead():
                        self._signals.end_with_main_process()
                elif time.monotonic() > self._terminated_s + STOP_S:
                    print(f"{self._job.name} has not ended {STOP_S} s after SIGTERM; it is killed", flush=True)
                    code = -signal.SIGKILL
        kill_descendants(spared=others)
        return code

    def _environment(self, log: BinaryIO | None) -> dict[str, str]:
        """Return the step's environment with the address of the ranks' rendezvous and the files of the flight recorder.

        Each step gets another port, because a process of the last attempt may still listen on the last one.
        """
        variables = without_launcher(os.environ, self._job.slurm)
        if log:
            variables.setdefault(COLLECTIVE_RECORDS, AttemptLogs.collective_record_prefix(Path(log.name)))
        if not self._job.slurm:
            variables.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_S - _TORCHRUN_MARGIN_S))  # else 30 s
            return variables
        self._started_steps += 1
        job_id, nodes = int(self._allocation.job_id or 0), self._allocation.nodes
        port = _FIRST_PORT + (job_id * 16 + self._allocation_number * 4 + self._started_steps) % _PORTS
        address = master_address(nodes[0], self._job.master_suffix, self._job.master_interface)
        print(f"job {job_id}: {len(nodes)} nodes, rendezvous {address}:{port}", flush=True)
        return {**variables, "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _children() -> frozenset[int]:
    """Return the present children of this process, which also adopts orphans from now on: a rank may survive torchrun."""
    adopt_orphans()
    return frozenset(child.pid for child in psutil.Process().children())


def _end_with_supervisor() -> None:
    signal_at_end_of_parent(signal.SIGTERM)


def _new_log(logs: AttemptLogs) -> BinaryIO | None:
    """Create the log after the newest one; None where that is not possible. A log must not be the reason that a job fails."""
    with suppress(OSError):
        logs.path.mkdir(parents=True, exist_ok=True)
        number = logs.next_number()
        while True:
            with suppress(FileExistsError):
                return logs.log(number).open("xb")
            number += 1
    return None


def _unreported_failure(title: str, code: int) -> Failure:
    return Failure(TRANSIENT, f"{title}: exited with code {code}", "", host=this_host())
