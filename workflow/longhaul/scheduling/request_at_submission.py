"""Changes a job's request when it is submitted: excludes quarantined nodes, waits for an earlier active job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longhaul.artifacts.job_state import read_state
from longhaul.artifacts.paths import QUARANTINE, STAGE_KIND, JobId
from longhaul.artifacts.quarantine import quarantined_nodes, read_quarantine
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_request
from longhaul.planning import Plan
from longhaul.planning.slurm_request import SlurmRequest, one_minute_request
from longhaul.scheduling.node_shortage import find_shortage
from longhaul.scheduling.retry_policy import final_failure


def submitted_request(plan: Plan, job: JobId, workdir: Path) -> SlurmRequest:
    """Return the plan's request without quarantined nodes, and dependent on an earlier Slurm job that may still be active.

    A job that would only fail again requests one task and one minute, to print its cause. The Snakemake process inside a job
    calls this, too; it never raises.
    """
    request, folder = job_request(plan, job), workdir / plan.paths.job(job).path
    if final_failure(folder):
        return one_minute_request(plan.site)
    state = read_state(folder)
    after = state.job_id if state and state.may_be_active else None
    return replace(request, exclude=quarantined_nodes(workdir / QUARANTINE), after_job=after)


def require_enough_nodes(plan: Plan, workdir: Path) -> None:
    """Check with Slurm that the quarantine leaves enough nodes for every stage.

    Raises:
        UserError: it does not, or the quarantine file is invalid.
    """
    read_quarantine(workdir / QUARANTINE)
    for stage in plan.stages if plan.site.scheduler == "slurm" else ():
        request = job_request(plan, JobId(STAGE_KIND, (stage.name,)))
        if shortage := find_shortage(request.partition, request.nodes, workdir / QUARANTINE):
            raise UserError(f"stages.{stage.name}: {shortage.cause}", shortage.remedy)
