"""Class of a job kind (spec, request, rerun key, steps, max_restarts), and the lists of all kinds and all jobs of a run.

Each module in `longhaul.jobs.kinds` declares its kinds as KIND or KINDS. They are found by listing that folder, so a new
step of the pipeline needs a declaration there, a rule file, and one `include:` in workflow/Snakefile.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from longhaul.artifacts.paths import JobId
from longhaul.jobs import kinds
from longhaul.jobs.job_spec import JobSpec
from longhaul.planning import Plan
from longhaul.planning.slurm_request import SlurmRequest

OF = "of"
"""The only word in names of jobs that is no wildcard: encode-web-1-of-2."""


@dataclass(frozen=True)
class PlannedStep:
    """One step of a job: `longhaul job <kind> <file>` on the tasks of a request."""

    title: str
    kind: str
    spec: JobSpec
    file: str  # name of the spec's file in the job's folder
    request: SlurmRequest
    binds_ranks: bool = False
    outside_environment: bool = False  # runs in the Python of the main process, outside of the job environment
    starts_tasks: bool = False  # one process on the first node, without srun or torchrun: it starts the tasks itself


@dataclass(frozen=True)
class JobKind:
    """The declaration of one kind of job."""

    name: str
    """First word of the jobs' names, the name of their rule unless on_demand, and their verb in `longhaul job <name>`."""
    order: int
    """Position in the pipeline; tables are sorted by it."""
    help: str
    spec: type[JobSpec]
    entry_point: str
    """`module:function`; the function takes the spec and runs the job. A string, as parsing the rules must not import torch."""
    jobs: Callable[[Plan], Sequence[JobId]]
    """Returns the jobs of this kind that a plan has."""
    build_spec: Callable[[Plan, JobId], JobSpec]
    request: Callable[[Plan, JobId], SlurmRequest]
    wildcards: tuple[str, ...] = ()
    """Wildcards of the rule, in the order of the job's name. OF stands for itself."""
    rerun_key: Callable[[Plan, JobId], str] | None = None
    """Returns a hash; a finished job runs again when it changes. Default: JobSpec.rerun_key without the lock of fetch."""
    needs_fetch: bool = True
    """True if the spec depends on what fetch downloads."""
    first_steps: Callable[[Plan, JobId, SlurmRequest], Sequence[PlannedStep]] = lambda plan, job, request: ()
    """Steps before the job's own."""
    more_files: Callable[[Plan, JobId], Mapping[str, str]] = lambda plan, job: {}
    """Name -> text of further files in the job's folder."""
    max_restarts: Callable[[Plan, JobId], int] = lambda plan, job: 0
    binds_ranks: bool = False
    """True if the site's cpu_bind and gpu_bind apply to the job's own step."""
    outside_environment: Callable[[Plan], bool] = lambda plan: False
    """Returns whether the job's own step runs outside of the job environment, because it starts programs of another one."""
    uses_unrequested_gpu: bool = False
    """True if the jobs ask for no GPU, but compute on one where their machine has some."""
    on_demand: bool = False
    """True if no rule starts the jobs: a verb of `longhaul` does."""

    def job_id(self, wildcards: object) -> JobId:
        """Return the job that a rule's wildcards stand for."""
        return JobId(self.name, tuple(getattr(wildcards, word, word) for word in self.wildcards))

    def load_entry_point(self) -> Callable[[object], None]:
        """Import and return the function that runs the job."""
        module, function = self.entry_point.split(":")
        return getattr(import_module(module), function)


def wildcard_values(job: JobId) -> tuple[str, ...]:
    """Return the values of a job's wildcards in its rule, `run` apart."""
    words = job_kinds()[job.kind].wildcards
    return tuple(name for word, name in zip(words, job.names, strict=True) if word != OF)


def job_name_by_hand(run: str, job: str) -> str:
    """Return the name in Slurm of a job that is submitted with job.sbatch.

    A name in a config has no dot. With a hyphen, stage `evaluate-x` of run `r` could have the name of a job of run `r-train`.
    """
    return f"longhaul-{run}.{job}"


@cache
def job_kinds() -> dict[str, JobKind]:
    """Return every declared job kind by name, in the order of the pipeline."""
    found: list[JobKind] = []
    for module in pkgutil.iter_modules(kinds.__path__):
        declared = import_module(f"{kinds.__name__}.{module.name}")
        found += getattr(declared, "KINDS", None) or [declared.KIND]
    return {kind.name: kind for kind in sorted(found, key=lambda kind: kind.order)}


def jobs_of(plan: Plan) -> list[JobId]:
    """Return every job that Snakemake may start for a run, in the order of the pipeline."""
    return [job for kind in job_kinds().values() if not kind.on_demand for job in kind.jobs(plan)]


def jobs_on_demand(plan: Plan) -> list[JobId]:
    """Return every job of a run that only a verb of `longhaul` starts."""
    return [job for kind in job_kinds().values() if kind.on_demand for job in kind.jobs(plan)]


def job_spec(plan: Plan, job: JobId) -> JobSpec:
    return job_kinds()[job.kind].build_spec(plan, job)


def job_request(plan: Plan, job: JobId) -> SlurmRequest:
    """Return what the plan requests for a job; scheduling.resource_requests adds what is known at submission."""
    return job_kinds()[job.kind].request(plan, job)


def job_rerun_key(plan: Plan, job: JobId) -> str:
    """Return a hash of what a job's result depends on apart from its inputs.

    It is the same before and after fetch, as otherwise fetching would run finished jobs again.
    """
    kind = job_kinds()[job.kind]
    if kind.rerun_key:
        return kind.rerun_key(plan, job)
    return kind.build_spec(Plan(plan.loaded, None, plan.stages), job).rerun_key()
