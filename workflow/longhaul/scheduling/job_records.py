"""Writes state.json, history.jsonl and failure.json of a job; counts its allocations, requeues included; quarantines nodes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from longhaul.artifacts.job_state import (
    Failure,
    State,
    StateName,
    current_invocation,
    launch_key,
    read_failure,
    read_state,
    this_host,
    utc_now,
)
from longhaul.artifacts.line_records import append_record
from longhaul.artifacts.paths import JobFolder, RunPaths, WeightsFolder
from longhaul.artifacts.quarantine import add_to_quarantine
from longhaul.errors import UserError
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.scheduling.allocation import Allocation


class JobRecords:
    """Reads and writes the records of one job in one allocation."""

    def __init__(self, job: LaunchSpec) -> None:
        self._job, self._folder = job, JobFolder(Path(job.folder))
        self._key, self._invocation = launch_key(job.inputs, job.data), current_invocation(RunPaths(job.run))
        self._allocation = Allocation(None, [this_host()])
        self._number = 1
        self.earlier_failure = read_failure(self._folder.path)
        self.step_at_start = self.newest_step()
        """Newest step that was saved before this allocation."""

    @property
    def allocation_number(self) -> int:
        """Number of this allocation of the job, counted from 1."""
        return self._number

    def known_failure(self) -> Failure | None:
        """Return the earlier failure if the job would only fail again."""
        failure = self.earlier_failure
        return failure if failure and failure.still_applies(self._key, self._invocation) else None

    def failed_the_same_way(self, failure_class: str) -> bool:
        """Return whether the earlier allocation failed with this class, with the same inputs."""
        earlier = self.earlier_failure
        return earlier is not None and earlier.failure_class == failure_class and earlier.key == self._key

    def begin(self, allocation: Allocation) -> State | None:
        """Begin the records of a new allocation. Return the job's state before it."""
        earlier = read_state(self._folder.path)
        self._allocation = allocation
        self._number = earlier.allocation + 1 if earlier and earlier.state != "done" else 1
        return earlier

    def write_running(self) -> None:
        """Record that the job runs, and remove the earlier failure."""
        self._folder.failure.unlink(missing_ok=True)
        self._write_state("running", "")
        self.append_event("running", "", queued_since_s=self._allocation.queued_since_s)

    def write_end(self, state: StateName, reason: str = "") -> None:
        """Record how the allocation ends: done, failed, or waiting for the next allocation."""
        self._exit_if_superseded()
        self._write_state(state, reason)
        self.append_event(state, reason)

    def write_failure(self, failure: Failure) -> Failure:
        """Record why the job failed. Return the failure with the job's key."""
        self._exit_if_superseded()
        failure = replace(failure, key=self._key, invocation=self._invocation, job_id=self._allocation.job_id)
        failure.write(self._folder.failure)
        self.write_end("failed", f"{failure.failure_class}: {failure.cause}")
        return failure

    def append_event(self, event: str, reason: str, **values: float | None) -> None:
        """Append a line to history.jsonl, from which report/goodput.py computes how the stage's time was spent."""
        line = {
            "time_s": round(time.time(), 3),
            "event": event,
            "allocation": self._number,
            "job_id": self._allocation.job_id,
            "reason": reason,
            **values,
        }
        append_record(self._folder.history, line)

    def quarantine(self, causes: Mapping[str, str]) -> None:
        """Exclude nodes from later submissions. A quarantine list that is not valid stays as its user left it.

        causes: node -> why it is excluded
        """
        name, path = self._job.name, self._job.quarantine
        try:
            add_to_quarantine(Path(path), causes, f"{name}, job {self._allocation.job_id}")
        except UserError as error:
            for node, cause in causes.items():
                print(f"warning: {node}: {cause}; not added to {path}: {error}", flush=True)
            return
        for node, cause in causes.items():
            print(f"{node}: {cause}; excluded from later jobs ({path})", flush=True)

    def newest_step(self) -> int:
        """Return the newest step that a complete checkpoint of the job holds; 0 if there is none."""
        root = self._job.checkpoints
        return WeightsFolder.newest_step(Path(root)) if root else 0

    def _write_state(self, state: StateName, reason: str) -> None:
        job_id, nodes = self._allocation.job_id, self._allocation.nodes
        State(state, job_id, this_host(), nodes, self._number, utc_now(), reason).write(self._folder.state)

    def _exit_if_superseded(self) -> None:
        """Exit if a later allocation has taken over.

        A node that lost its network may come back, with this process, long after the job was started on other nodes.
        """
        state = read_state(self._folder.path)
        if state and (state.job_id, state.allocation) != (self._allocation.job_id, self._number):
            print(
                f"{self._job.name}: superseded by job {state.job_id}, allocation {state.allocation}; exiting",
                flush=True,
            )
            sys.exit(1)
