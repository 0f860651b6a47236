"""Declares the step of the fabric check that runs the programs of nccl-tests. It is no job of its own."""

from __future__ import annotations

from longhaul.artifacts.paths import JobFolder, JobId
from longhaul.config.site_config import Site
from longhaul.jobs.job_kind import JobKind, PlannedStep
from longhaul.jobs.job_spec import JobSpec
from longhaul.jobs.kinds.environment_job import check_request
from longhaul.planning import Plan
from longhaul.planning.slurm_request import SlurmRequest


class NcclTestsSpec(JobSpec):
    """Measures the collectives of the fabric check with the programs of nccl-tests."""

    programs: str  # their folder on the nodes, from the site file
    launcher: tuple[
        str, ...
    ]  # srun with its options, one process per GPU; (): one process on this machine has all GPUs
    ranks: int
    folder: str  # the job's folder


def nccl_tests_step(plan: Plan, job: JobId, request: SlurmRequest) -> list[PlannedStep]:
    """Return the step if the site names the programs. A single rank has nothing to measure."""
    if not plan.site.interconnect.nccl_tests or request.tasks == 1:
        return []
    title, spec = "Measurement with the programs of nccl-tests", _spec(plan, job, request)
    file = JobFolder(plan.paths.job(job).path).nccl_tests_spec.name
    # Containers have no srun, and their image seldom has the programs: they run on the nodes themselves.
    return [PlannedStep(title, KIND.name, spec, file, request, outside_environment=True, starts_tasks=True)]


def _spec(plan: Plan, job: JobId, request: SlurmRequest) -> NcclTestsSpec:
    return NcclTestsSpec(
        run=plan.run,
        programs=plan.site.interconnect.nccl_tests or "",
        launcher=_srun(plan.site, request) if plan.site.scheduler == "slurm" else (),
        ranks=request.tasks,
        folder=str(plan.paths.job(job).path),
    )


def _srun(site: Site, request: SlurmRequest) -> tuple[str, ...]:
    """Return srun's words. Without --mpi=none, which the other steps have: MPI connects these processes."""
    binding = ["--cpu-bind=none"] if site.partition_for("gpu").cpu_bind else []
    return ("srun", *request.as_srun(), "--kill-on-bad-exit=1", *binding, *site.srun_extra)


KIND = JobKind(
    name="nccl_tests",
    order=2,
    help="measure with the programs of nccl-tests",
    spec=NcclTestsSpec,
    entry_point="longhaul.checks.nccl_tests:run",
    jobs=lambda plan: [],
    build_spec=lambda plan, job: _spec(plan, job, check_request(plan, tasks=plan.check_gpus_per_node)),
    request=lambda plan, job: check_request(plan, tasks=plan.check_gpus_per_node),
    on_demand=True,
    needs_fetch=False,
)
