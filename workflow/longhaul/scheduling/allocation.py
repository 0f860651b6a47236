"""Describes this job's allocation: nodes, partition, Slurm's restart count; the time within which a node must respond; refuses
a second active job.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from longhaul.artifacts.job_state import read_state, this_host
from longhaul.errors import UserError
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.scheduling import slurm_client
from longhaul.scheduling.slurm_client import JobInfo, SlurmCommandError

_SRUN_TIMEOUT_S = 20.0
_SLURM_TIMEOUT_S = 600.0
_POLL_INTERVAL_S = 5.0
_SUBMIT_HINT = "submit job.sbatch with sbatch, or run the config: longhaul run CONFIG"


@dataclass(frozen=True)
class Allocation:
    """One allocation.

    job_id:         Slurm's job id; None without Slurm
    queued_since_s: last submission of the job, in seconds since the epoch by this host's clock; None without Slurm
    restarts:       how often Slurm had requeued the job when the allocation began
    """

    job_id: str | None
    nodes: list[str]
    partition: str = ""
    queued_since_s: float | None = None
    restarts: int = 0

    def slurm_info(self) -> JobInfo | None:
        """Return Slurm's description of the job; None if Slurm does not answer."""
        try:
            return slurm_client.job_info(str(self.job_id))
        except SlurmCommandError:
            return None

    def unresponsive_nodes(self) -> list[str]:
        """Return nodes, other than this one, that are down or cannot start a process."""
        others = self._other_nodes()
        return self.down_nodes() or (slurm_client.unresponsive_nodes(others, _SRUN_TIMEOUT_S) if others else [])

    def down_nodes(self) -> list[str]:
        """Return nodes, other than this one, that Slurm lists as down."""
        others = self._other_nodes()
        return slurm_client.down_nodes(others) if others else []

    def _other_nodes(self) -> list[str]:
        return [node for node in self.nodes if node != this_host()]


def join_allocation(job: LaunchSpec) -> Allocation:
    """Return the allocation that this process runs in.

    Raises:
        UserError:  there is no allocation, or it does not have the planned number of nodes.
        SystemExit: another Slurm job is active for the same job.
    """
    if not job.slurm:
        return Allocation(None, [this_host()])
    job_id = os.environ.get("SLURM_JOB_ID")
    if not job_id:
        raise UserError("SLURM_JOB_ID is not set: this is no allocation", _SUBMIT_HINT)
    info = _wait_for_info(job_id)
    if info is None:
        raise UserError(f"job {job_id} is unknown to Slurm", _SUBMIT_HINT)
    if info.nodes != job.nodes:
        raise UserError(
            f"the allocation has {info.nodes} nodes; the plan says {job.nodes}",
            "drop --set-resources, or set nodes in the config",
        )
    allocation = Allocation(
        job_id,
        slurm_client.expand_node_list(info.node_list),
        info.partition,
        None if info.submit_s is None else info.submit_s + slurm_client.clock_offset_s(),
        info.restarts,
    )
    _exit_if_another_job_is_active(job, job_id)
    return allocation


def _exit_if_another_job_is_active(job: LaunchSpec, job_id: str) -> None:
    """Exit if an earlier Slurm job still works on this job. The next submission depends on that one in the queue."""
    state = read_state(Path(job.folder))
    if state is None or not state.may_be_active or state.job_id == job_id:
        return
    other = _wait_for_info(str(state.job_id))
    if other is not None and not other.has_ended:
        print(f"job {state.job_id} ({other.state}) works on {job.name}; exiting", flush=True)
        sys.exit(1)


def _wait_for_info(job_id: str) -> JobInfo | None:
    """Return Slurm's description of a job, None if the job is unknown to Slurm. Wait while slurmctld restarts.

    Raises:
        UserError: Slurm does not answer for _SLURM_TIMEOUT_S seconds.
    """
    deadline = time.monotonic() + _SLURM_TIMEOUT_S
    while True:
        try:
            return slurm_client.job_info(job_id)
        except SlurmCommandError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"Slurm has not answered for {_SLURM_TIMEOUT_S:g} s: {error}", "check slurmctld"
                ) from None
            time.sleep(_POLL_INTERVAL_S)
