"""Declares the fabric check: collectives between all ranks of an allocation."""

from __future__ import annotations

from typing import Literal

from longhaul.artifacts.paths import JobId
from longhaul.artifacts.site_baseline import SiteBaseline, read_baseline
from longhaul.config.site_config import FabricLimits
from longhaul.jobs.job_kind import JobKind
from longhaul.jobs.job_spec import JobSpec
from longhaul.jobs.kinds.environment_job import check_request
from longhaul.jobs.kinds.nccl_tests_job import nccl_tests_step
from longhaul.planning import Plan

FEWEST_COMPARED_NODES = 3
"""With fewer nodes there is one pair, and nothing to compare it with."""


class FabricSpec(JobSpec):
    """Measures pairs of nodes and collectives, and compares collectives with the site's limits."""

    no_rerun_fields = JobSpec.no_rerun_fields | {"baseline"}

    nodes: int
    gpus_per_node: int
    limits: FabricLimits
    node_limits: FabricLimits
    baseline: SiteBaseline | None  # from the file beside the site file
    pairs_only: (
        bool  # the quick half, before a training on its own nodes: slow nodes are named, collectives not measured
    )
    bad_hardware: Literal["refuse", "warn"]  # what follows from a slow node, link or rate
    folder: str  # the job's folder, for the results of each node
    out: str  # fabric.json
    nccl_tests: str | None = None  # folder of nccl-tests' programs; the step before this one has run them


def fabric_spec(plan: Plan, job: JobId, nodes: int, gpus_per_node: int, out: str, pairs_only: bool) -> FabricSpec:
    """Return the spec of a check of this number of nodes that writes its report to `out`."""
    return FabricSpec(
        run=plan.run,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        limits=plan.site.interconnect.limits,
        node_limits=plan.site.interconnect.node_limits,
        baseline=read_baseline(plan.loaded.site_path),
        pairs_only=pairs_only,
        bad_hardware=plan.config.checks.bad_hardware,
        folder=str(plan.paths.job(job).path),
        out=out,
        nccl_tests=plan.site.interconnect.nccl_tests if nodes * gpus_per_node > 1 and not pairs_only else None,
    )


def _build(plan: Plan, job: JobId) -> FabricSpec:
    return fabric_spec(plan, job, plan.check_nodes, plan.check_gpus_per_node, str(plan.paths.fabric), pairs_only=False)


KIND = JobKind(
    name="fabric",
    order=2,
    help="measure the network between the ranks",
    spec=FabricSpec,
    entry_point="longhaul.checks.fabric:run",
    jobs=lambda plan: [JobId("fabric")],
    build_spec=_build,
    request=lambda plan, job: check_request(plan, tasks=plan.check_gpus_per_node),
    first_steps=nccl_tests_step,
    needs_fetch=False,
)
