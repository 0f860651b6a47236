"""The Slurm request of a job: every option of its allocation, and how Snakemake, sbatch and srun spell it.

One request gives a rule's `resources:` and the header of the rendered job.sbatch, so a job that is submitted by hand gets
the same allocation. Every job uses one form: `mpi=""` makes the executor plugin leave the rule's shell command unwrapped
(the plugin tests the value at submission and the presence of the key inside the job), and `--ntasks-per-node` in
`slurm_extra` spreads the tasks evenly. A test compares both spellings through the plugin's own command builder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from longhaul.config.site_config import Partition, Site

# The plugin cannot request --mem=0: it drops a zero, and it refuses the option in slurm_extra. Its command line goes
# through a shell, which removes the empty quotes.
_ALL_MEMORY_EXTRA = "--mem''=0"

RESOURCE_KEYS = (
    "nodes",
    "tasks",
    "tasks_per_gpu",
    "mpi",
    "cpus_per_task",
    "mem_mb",
    "runtime",
    "gres",
    "slurm_partition",
    "slurm_account",
    "qos",
    "constraint",
    "slurm_extra",
)


@dataclass(frozen=True)
class SlurmRequest:
    """The options of one allocation.

    memory_mb: MiB per node; 0 requests all of the node's memory, None sends no option.
    exclude:   nodes to exclude. An empty tuple sends an empty list, because the plugin otherwise excludes every node of an
               earlier failure (the last --exclude wins). None sends no option.
    after_job: id of the job that must end before this one starts.
    """

    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    minutes: int
    partition: str
    gpus_per_node: int = 0
    gpu_request: Literal["gpus_per_node", "gres", "none"] = "none"
    gpu_type: str | None = None
    memory_mb: int | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclusive: bool = False
    exclude: tuple[str, ...] | None = None
    after_job: str | None = None

    @property
    def tasks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def _gpus(self) -> str:
        return f"{self.gpu_type}:{self.gpus_per_node}" if self.gpu_type else str(self.gpus_per_node)

    @property
    def _uses_gres(self) -> bool:
        return self.gpu_request == "gres" and self.gpus_per_node > 0

    @property
    def _uses_gpus_per_node(self) -> bool:
        return self.gpu_request == "gpus_per_node" and self.gpus_per_node > 0

    def as_resources(self) -> dict[str, int | str]:
        """Return the rule's `resources:` under the executor plugin's names."""
        # With gres the plugin turns `tasks` into tasks per GPU; tasks_per_gpu=0 prevents that.
        shape = {"gres": f"gpu:{self._gpus}", "tasks_per_gpu": 0} if self._uses_gres else {"tasks": self.tasks}
        resources = {
            "nodes": self.nodes,
            **shape,
            "mpi": "",
            "cpus_per_task": self.cpus_per_task,
            "runtime": self.minutes,
            "slurm_partition": self.partition,
            "slurm_extra": " ".join(self._extra()),
            # Snakemake refuses a function of mem_mb that returns None; the plugin sends no option for 0.
            "mem_mb": self.memory_mb or 0,
            "slurm_account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
        }
        return {key: value for key, value in resources.items() if value is not None}

    def _extra(self) -> list[str]:
        extra = [f"--ntasks-per-node={self.tasks_per_node}", "--open-mode=append"]
        if self._uses_gpus_per_node:
            extra.append(f"--gpus-per-node={self._gpus}")
        if self.memory_mb == 0:
            extra.append(_ALL_MEMORY_EXTRA)
        if self.reservation:
            extra.append(f"--reservation={self.reservation}")
        if self.exclusive:
            extra.append("--exclusive")
        if self.exclude is not None:
            extra.append(f"--exclude={','.join(self.exclude)}")
        if self.after_job:
            extra.append(f"--dependency=afterany:{self.after_job}")
        return extra

    def as_sbatch(self) -> dict[str, str]:
        """Return long sbatch options and their values; an option with an empty value is a flag."""
        options = {
            "--nodes": self.nodes,
            "--ntasks": None if self._uses_gres else self.tasks,
            "--ntasks-per-node": self.tasks_per_node,
            "--cpus-per-task": self.cpus_per_task,
            "--gpus-per-node": self._gpus if self._uses_gpus_per_node else None,
            "--gres": f"gpu:{self._gpus}" if self._uses_gres else None,
            "--mem": self.memory_mb,
            "--time": self.minutes,
            "--partition": self.partition,
            "--account": self.account,
            "--qos": self.qos,
            "--constraint": self.constraint,
            "--reservation": self.reservation,
            "--exclusive": "" if self.exclusive else None,
            "--exclude": ",".join(self.exclude) if self.exclude else None,
            "--dependency": f"afterany:{self.after_job}" if self.after_job else None,
            "--open-mode": "append",
        }
        return {option: str(value) for option, value in options.items() if value is not None}

    def as_srun(self) -> list[str]:
        """Return the size of a step over the whole allocation; srun cannot read it from SLURM_*, which the plugin removes."""
        options = [
            f"--nodes={self.nodes}",
            f"--ntasks={self.tasks}",
            f"--ntasks-per-node={self.tasks_per_node}",
            f"--cpus-per-task={self.cpus_per_task}",
        ]
        if self._uses_gpus_per_node:
            options.append(f"--gpus-per-node={self._gpus}")
        if self._uses_gres:
            options.append(f"--gres=gpu:{self._gpus}")
        return options


_CONTROLLER_MB = 2000  # enough for Snakemake with the few dozen jobs of a run


def partition_for(site: Site, kind: str) -> Partition | None:
    """Return the partition for cpu, gpu or debug jobs: the gpu partition where the site names no other one."""
    if site.partitions is None:
        return None
    return getattr(site.partitions, kind) or site.partitions.gpu


def gpu_request(site: Site, *, partition_kind: str, nodes: int, tasks: int, gpus: int, minutes: int) -> SlurmRequest:
    """Return the request of a job on GPU nodes; tasks and gpus are per node.

    A job that uses some of a node's GPUs gets the same share of its cores and memory, so that two such jobs fit on a node.
    """
    partition = partition_for(site, partition_kind)
    share = gpus / (site.node.gpus or site.node.cpus)
    return SlurmRequest(
        nodes=nodes,
        tasks_per_node=tasks,
        cpus_per_task=max(1, int(site.node.cpus * share) // tasks),
        minutes=_allowed_minutes(minutes, partition),
        partition=partition.name if partition else "",
        gpus_per_node=gpus if site.node.gpus else 0,
        gpu_request=site.gpu_request,
        gpu_type=site.gpu_type,
        memory_mb=_memory_mb(site, share),
        **_site_options(site),
    )


def cpu_request(site: Site, minutes: int) -> SlurmRequest:
    """Return the request of a job that uses all cores of one node and no GPU."""
    partition = partition_for(site, "cpu")
    return SlurmRequest(
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=site.node.cpus,
        minutes=_allowed_minutes(minutes, partition),
        partition=partition.name if partition else "",
        memory_mb=_memory_mb(site, 1.0),
        **_site_options(site),
    )


def controller_request(site: Site) -> SlurmRequest:
    """Return the request of the main Snakemake process as a job: one core for as long as its partition allows."""
    partition = partition_for(site, "cpu")
    memory_mb = None if site.memory == "omit" else min(_CONTROLLER_MB, site.node.memory_mb)
    request = cpu_request(site, partition.max_minutes if partition else 1)
    return replace(request, cpus_per_task=1, memory_mb=memory_mb, exclusive=False)


def one_minute_request(site: Site, request: SlurmRequest) -> SlurmRequest:
    """Return the smallest request for a job that only reports why it cannot run."""
    partition = partition_for(site, "cpu")
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


def _allowed_minutes(minutes: int, partition: Partition | None) -> int:
    return min(minutes, partition.max_minutes) if partition else minutes


def _memory_mb(site: Site, share: float) -> int | None:
    return {"per_node": max(1, int(site.node.memory_mb * min(1.0, share))), "all": 0, "omit": None}[site.memory]


def _site_options(site: Site) -> dict[str, Any]:
    return {
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "reservation": site.reservation,
        "exclusive": site.exclusive,
    }
