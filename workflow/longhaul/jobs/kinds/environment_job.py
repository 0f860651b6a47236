"""Declares the environment check: one process per node; its spec and request."""

from __future__ import annotations

from longhaul.artifacts.paths import JobFolder, JobId
from longhaul.artifacts.site_baseline import SiteBaseline, read_baseline
from longhaul.config.node_minimums import NodeMinimums
from longhaul.config.partition_config import JobPlace
from longhaul.config.run_config import Checks
from longhaul.jobs.job_kind import JobKind
from longhaul.jobs.job_spec import JobSpec
from longhaul.planning import Plan
from longhaul.planning.slurm_request import SlurmRequest, gpu_request


class EnvironmentSpec(JobSpec):
    """Checks the nodes that it runs on."""

    no_rerun_fields = JobSpec.no_rerun_fields | {"scratch", "baseline", "job_folder"}

    nodes: int
    gpus_per_node: int
    checks: Checks
    memory_mb: int  # memory of a node in MiB, from the site file
    interconnect: str  # infiniband | roce | ethernet | none, from the site file
    socket_interface: str | None  # from the site file
    build: str  # build of torch that the site file names: cuda 13.0, rocm 6.4 or cpu
    scratch: str | None
    prebuild_ops: tuple[str, ...]  # DeepSpeed op builders that the stages need, such as "cpu_adam"
    swap_bytes: int  # what a node's ranks offload to its disk below scratch; 0 without offload to NVMe
    locked_bytes: int  # memory that each rank must be able to lock for that
    measures_speed: (
        bool  # measure GPUs, memory and disks; false on a stage's own nodes, which test their GPUs for 3 s alone
    )
    minimums: NodeMinimums  # from the site file
    baseline: SiteBaseline | None  # from the file beside the site file
    folder: str  # where free space and write access are tested
    job_folder: str  # the job's folder, for the results of each node
    out: str  # environment.json


def environment_spec(
    plan: Plan, folder: JobFolder, place: JobPlace, nodes: int, gpus_per_node: int, out: str
) -> EnvironmentSpec:
    """Return the spec of a check by a job on this number of nodes of a partition that writes its report to `out`."""
    swapped = [stage for stage in plan.stages if stage.stage.zero.nvme_keys]
    memory = [(stage.memory, stage.stage.gpus_per_node) for stage in swapped if stage.memory]
    offloads = any(stage.stage.zero.offload_optimizer != "none" for stage in plan.stages)
    return EnvironmentSpec(
        run=plan.run,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        checks=plan.config.checks,
        memory_mb=plan.site.partition_for(place).node.memory_mb,
        interconnect=plan.site.interconnect.kind,
        socket_interface=plan.site.interconnect.socket_interface,
        build=plan.site.accelerator.build,
        scratch=plan.config.storage.scratch,
        prebuild_ops=(("cpu_adam",) if offloads else ()) + (("pin_memory", "async_io") if swapped else ()),
        swap_bytes=max((rank.disk * ranks for rank, ranks in memory), default=0),
        locked_bytes=max((rank.locked for rank, _ in memory), default=0),
        measures_speed=out == str(plan.paths.environment),
        minimums=plan.site.node_minimums,
        baseline=read_baseline(plan.loaded.site_path),
        folder=plan.config.storage.weights or str(plan.paths.folder),
        job_folder=str(folder.path),
        out=out,
    )


def check_request(plan: Plan, tasks: int) -> SlurmRequest:
    """Return the request of a check before training, with this number of tasks per node."""
    return gpu_request(
        plan.site,
        place="debug",
        nodes=plan.check_nodes,
        tasks=tasks,
        gpus=plan.check_gpus_per_node,
        minutes=plan.config.checks.minutes,
    )


KIND = JobKind(
    name="environment",
    order=1,
    help="check the nodes: versions, GPUs, disk, clocks, compiled ops",
    spec=EnvironmentSpec,
    entry_point="longhaul.checks.environment:run",
    jobs=lambda plan: [JobId("environment")],
    build_spec=lambda plan, job: environment_spec(
        plan, plan.paths.job(job), "debug", plan.check_nodes, plan.check_gpus_per_node, str(plan.paths.environment)
    ),
    request=lambda plan, job: check_request(plan, tasks=1),
    needs_fetch=False,
)
