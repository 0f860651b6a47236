"""What a job asks Slurm for at the moment it is submitted: its plan's request, and what was learnt since."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from longhaul.artifacts.job_state import Failure, invocation, launch_key, read_failure, read_state
from longhaul.artifacts.quarantine import read_quarantine
from longhaul.errors import UserError
from longhaul.jobs.launch_files import QUARANTINE, job_folder, stage_folder
from longhaul.jobs.specs import LaunchSpec
from longhaul.planning import Plan, partition_for
from longhaul.planning.slurm_request import SlurmRequest
from longhaul.scheduling.slurm_client import too_few_nodes


def submitted_request(plan: Plan, job: str, workdir: Path) -> SlurmRequest:
    """The plan's request without quarantined nodes, behind the job that still works on it.

    A job that would only fail again asks for one task and one minute, in which it tells why. Also called on the node,
    by the Snakemake inside the job; it never raises.
    """
    request, folder = plan.request(job), workdir / _folder(plan, job)
    if final_failure(folder):
        return _a_minute(plan, request)
    state = read_state(folder)
    after = state.job_id if state and state.holds_job else None
    return replace(request, exclude=_quarantined(workdir), after_job=after)


def require_nodes(plan: Plan, workdir: Path) -> None:
    """Raises UserError when the quarantine is broken, or leaves too few nodes for a stage; Slurm is asked which there are."""
    left_out = list(read_quarantine(workdir / QUARANTINE).names)
    for stage in plan.stages if plan.site.scheduler == "slurm" else ():
        request = plan.request(f"train-{stage.name}")
        if missing := too_few_nodes(request.partition, request.nodes, left_out):
            raise UserError(f"stages.{stage.name}: {missing}", f"take those that are mended off {QUARANTINE}")


def _folder(plan: Plan, job: str) -> Path:
    verb, _, name = job.partition("-")
    return stage_folder(plan, name) if verb == "train" else job_folder(plan, job)


def final_failure(folder: Path) -> Failure | None:
    """Why a job that is started now would only fail again; None when it may go well. folder: results/<run>/…/<job>."""
    failure = read_failure(folder)
    if failure is None:
        return None
    try:
        job = LaunchSpec.read(folder / "launch.json")
    except UserError:
        return None
    key, run = launch_key(job.inputs, job.data), folder.parents[1]
    return failure if failure.is_current(key, invocation(run.parent, run.name)) else None


def _a_minute(plan: Plan, request: SlurmRequest) -> SlurmRequest:
    partition = partition_for(plan.site, "cpu")
    return replace(
        request,
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=1,
        minutes=1,
        partition=partition.name if partition else request.partition,
        gpus_per_node=0,
        memory_mb=request.memory_mb and 1000,
        exclusive=False,
    )


def _quarantined(workdir: Path) -> tuple[str, ...]:
    """A name that no host can have would make Slurm refuse every job."""
    try:
        names = read_quarantine(workdir / QUARANTINE).names
    except UserError:
        return ()
    return tuple(name for name in names if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name))
