"""Declares the fabric check: collectives between all ranks of an allocation."""

from __future__ import annotations

from longhaul.artifacts.paths import JobId
from longhaul.config.site_config import FabricLimits
from longhaul.jobs.job_kind import JobKind
from longhaul.jobs.job_spec import JobSpec
from longhaul.jobs.kinds.environment_job import check_request
from longhaul.planning import Plan


class FabricSpec(JobSpec):
    """Measures collectives and compares them with the site's limits."""

    nodes: int
    gpus_per_node: int
    limits: FabricLimits
    node_limits: FabricLimits
    out: str  # fabric.json


def _build(plan: Plan, job: JobId) -> FabricSpec:
    return FabricSpec(
        run=plan.run,
        nodes=plan.check_nodes,
        gpus_per_node=plan.check_gpus_per_node,
        limits=plan.site.interconnect.limits,
        node_limits=plan.site.interconnect.node_limits,
        out=str(plan.paths.fabric),
    )


KIND = JobKind(
    name="fabric",
    order=2,
    help="measure the network between the ranks",
    spec=FabricSpec,
    entry_point="longhaul.checks.fabric:run",
    jobs=lambda plan: [JobId("fabric")],
    build_spec=_build,
    request=lambda plan, job: check_request(plan, tasks=plan.check_gpus_per_node),
    needs_fetch=False,
)
