"""Options of a job's allocation, the controller's too (nodes, time, GPUs, memory, account), for Snakemake, sbatch and srun.

One request gives a rule's `resources:` and the header of the rendered job.sbatch, so a job that is submitted by hand gets
the same allocation. Every job uses one form: `mpi=""` makes the executor plugin leave the rule's shell command unwrapped
(the plugin tests the value at submission and the presence of the key inside the job), and `--ntasks-per-node` in
`slurm_extra` spreads the tasks evenly. A test compares both spellings through the plugin's own command builder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from longhaul.config.partition_config import JobPlace, Partition
from longhaul.config.site_config import Site

# Options that the plugin sets, and refuses in slurm_extra. It cannot request --mem=0: it drops a zero. It knows one generic
# resource only, and counts tasks by GPU with it.
_REFUSED_BY_PLUGIN = ("--mem", "--gres")

RESOURCE_KEYS = (
    "nodes",
    "tasks",
    "mpi",
    "cpus_per_task",
    "mem_mb",
    "runtime",
    "slurm_partition",
    "slurm_account",
    "qos",
    "constraint",
    "slurm_extra",
)


@dataclass(frozen=True)
class SlurmRequest:
    """The options of one allocation.

    partition: None sends no option.
    gres:      generic resources of each node in addition to the GPUs, such as nvme:100
    memory_mb: MiB per node; 0 requests all of the node's memory, None sends no option.
    extra:     further sbatch options, such as --mail-type=END
    exclude:   nodes to exclude. An empty tuple sends an empty list, because the plugin otherwise excludes every node of an
               earlier failure (the last --exclude wins). None sends no option.
    after_job: id of the job that must end before this one starts.
    """

    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    minutes: int
    partition: str | None
    gpus_per_node: int = 0
    gpu_request: Literal["gpus_per_node", "gres", "none"] = "none"
    gpu_type: str | None = None
    gres: tuple[str, ...] = ()
    memory_mb: int | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclusive: bool = False
    threads_per_core: int | None = None
    extra: tuple[str, ...] = ()
    exclude: tuple[str, ...] | None = None
    after_job: str | None = None

    @property
    def tasks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def _gpus(self) -> str:
        return f"{self.gpu_type}:{self.gpus_per_node}" if self.gpu_type else str(self.gpus_per_node)

    @property
    def _gpus_per_node(self) -> str | None:
        """The value of --gpus-per-node, or None."""
        return self._gpus if self.gpu_request == "gpus_per_node" and self.gpus_per_node else None

    @property
    def _gpu_gres(self) -> str | None:
        """The GPUs as a generic resource, or None."""
        return f"gpu:{self._gpus}" if self.gpu_request == "gres" and self.gpus_per_node else None

    @property
    def _gres(self) -> str | None:
        """The value of --gres, or None."""
        return ",".join([*filter(None, [self._gpu_gres]), *self.gres]) or None

    def as_resources(self) -> dict[str, int | str]:
        """Return the rule's `resources:` under the executor plugin's names."""
        resources = {
            "nodes": self.nodes,
            "tasks": self.tasks,
            "mpi": "",
            "cpus_per_task": self.cpus_per_task,
            "runtime": self.minutes,
            "slurm_partition": self.partition,
            "slurm_extra": " ".join(map(_hidden_from_plugin, self._extra())),
            # Snakemake refuses a function of mem_mb that returns None; the plugin sends no option for 0.
            "mem_mb": self.memory_mb or 0,
            "slurm_account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
        }
        return {key: value for key, value in resources.items() if value is not None}

    def _extra(self) -> list[str]:
        extra = [f"--ntasks-per-node={self.tasks_per_node}", "--open-mode=append"]
        if self._gpus_per_node:
            extra.append(f"--gpus-per-node={self._gpus_per_node}")
        if self._gres:
            extra.append(f"--gres={self._gres}")
        if self.threads_per_core:
            extra.append(f"--threads-per-core={self.threads_per_core}")
        if self.memory_mb == 0:
            extra.append("--mem=0")
        if self.reservation:
            extra.append(f"--reservation={self.reservation}")
        if self.exclusive:
            extra.append("--exclusive")
        extra += self.extra
        if self.exclude is not None:
            extra.append(f"--exclude={','.join(self.exclude)}")
        if self.after_job:
            extra.append(f"--dependency=afterany:{self.after_job}")
        return extra

    def as_sbatch(self) -> dict[str, str]:
        """Return long sbatch options and their values; an option with an empty value is a flag."""
        options = {
            **self._size(),
            "--gres": self._gres,
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
            **{name: value for name, _, value in (option.partition("=") for option in self.extra)},
        }
        return {option: str(value) for option, value in options.items() if value is not None}

    def options(self) -> list[str]:
        """Return the words of an sbatch command line."""
        return [f"{name}={value}" if value else name for name, value in self.as_sbatch().items()]

    def as_srun(self) -> list[str]:
        """Return the size of a step over the whole allocation; srun cannot read it from SLURM_*, which the plugin removes."""
        options = {**self._size(), "--gres": self._gpu_gres}
        return [f"{option}={value}" for option, value in options.items() if value is not None]

    def _size(self) -> dict[str, int | str | None]:
        """Return the options that sbatch and srun spell alike: nodes, tasks, cores and GPUs; None: not given."""
        return {
            "--nodes": self.nodes,
            "--ntasks": self.tasks,
            "--ntasks-per-node": self.tasks_per_node,
            "--cpus-per-task": self.cpus_per_task,
            "--threads-per-core": self.threads_per_core,
            "--gpus-per-node": self._gpus_per_node,
        }


def _hidden_from_plugin(option: str) -> str:
    """Return an option in a spelling that the plugin's check of slurm_extra lets pass, and that a shell reads unchanged.

    The check searches the whole text for names of options: it takes `-J` in `--reservation=course-JSC` for a job's name. The
    plugin's command line goes through a shell, which removes the empty quotes.
    """
    name, equals, value = option.partition("=")
    if name in _REFUSED_BY_PLUGIN:
        name += "''"
    return name + equals + value.replace("-", "-''")


class CpuJobNeeds(NamedTuple):
    """Cores and MiB of memory that a CPU job uses, whatever the size of the data."""

    cores: int
    memory_mb: int


# CPU jobs with few cores; jobs/kinds/ has the needs of the kinds of jobs. The others ask for all cores of a node: tokenizing and
# export use them, and training a tokenizer needs memory that grows with the words of the corpus.
CONTROLLER = CpuJobNeeds(1, 2000)  # Snakemake with the few dozen jobs of a run
SAY_WHY_NOT = CpuJobNeeds(1, 1000)  # a job that only reports why it cannot run


def gpu_request(site: Site, *, place: JobPlace, nodes: int, tasks: int, gpus: int, minutes: int) -> SlurmRequest:
    """Return the request of a job on GPU nodes; tasks and gpus are per node.

    A job that uses some of a node's GPUs gets the same share of its cores and memory, so that two such jobs fit on a node.
    """
    return _share_request(site.partition_for(place), nodes=nodes, tasks=tasks, gpus=gpus, minutes=minutes)


def cpu_request(site: Site, minutes: int, needs: CpuJobNeeds | None = None) -> SlurmRequest:
    """Return the request of a job that trains nothing, on one node.

    On a partition without GPUs it gets what it needs, on a GPU partition a share of a node. On this machine, and where jobs get
    only whole nodes, it gets all that the site file says of one node.

    needs: None: all cores and the memory of a node
    """
    partition = site.partition_for("cpu")
    if site.scheduler == "slurm" and partition.node.gpus:
        return _one_gpu_request(partition, minutes)
    if needs is None or partition.exclusive or site.scheduler == "local":
        return _request(partition, cpus=partition.node.cpus, memory_mb=partition.node.memory_mb, minutes=minutes)
    return _small_request(partition, needs, minutes)


def controller_request(site: Site) -> SlurmRequest:
    """Return the request of the main Snakemake process as a job, for as long as its partition allows.

    On a partition without GPUs it gets one core, on a GPU partition a share of a node.
    """
    partition = site.partition_for("login")
    minutes = partition.max_minutes or 1
    if partition.node.gpus:
        return _one_gpu_request(partition, minutes)
    return _small_request(partition, CONTROLLER, minutes)


def one_minute_request(site: Site) -> SlurmRequest:
    """Return the smallest request for a job that only reports why it cannot run."""
    request = cpu_request(site, minutes=1)
    return request if request.gpus_per_node else _small_request(site.partition_for("cpu"), SAY_WHY_NOT, minutes=1)


def _small_request(partition: Partition, needs: CpuJobNeeds, minutes: int) -> SlurmRequest:
    """Return a request of a few cores and their memory, never of a whole node.

    Where no job names its memory, it follows from the cores: then they must be enough for the memory, too.
    """
    node = partition.node
    cores, memory_mb = min(needs.cores, node.cpus), min(needs.memory_mb, node.memory_mb)
    if partition.memory == "omit":
        cores = max(cores, math.ceil(node.cpus * memory_mb / node.memory_mb))
    request = _request(partition, cpus=cores, memory_mb=memory_mb, minutes=minutes)
    return replace(request, memory_mb=None if partition.memory == "omit" else memory_mb, exclusive=False)


def _one_gpu_request(partition: Partition, minutes: int) -> SlurmRequest:
    """Return the request of a job on a GPU partition that uses no GPU.

    It gets one GPU and its share of cores and memory, because centres bill or refuse other shapes there; a whole node where
    jobs get only whole nodes.
    """
    gpus = partition.node.gpus if partition.exclusive else 1
    return _share_request(partition, nodes=1, tasks=1, gpus=gpus, minutes=minutes)


def _share_request(partition: Partition, *, nodes: int, tasks: int, gpus: int, minutes: int) -> SlurmRequest:
    """Return a request of `gpus` GPUs of each node with their share of its cores and memory.

    A node without GPUs has one rank per core at most, so `gpus` are ranks there.
    """
    node = partition.node
    share = min(1.0, gpus / (node.gpus or node.cpus))
    request = _request(
        partition,
        cpus=max(1, int(node.cpus * share) // tasks),
        memory_mb=max(1, int(node.memory_mb * share)),
        minutes=minutes,
    )
    return replace(request, nodes=nodes, tasks_per_node=tasks, gpus_per_node=gpus if node.gpus else 0)


def _request(partition: Partition, *, cpus: int, memory_mb: int, minutes: int) -> SlurmRequest:
    """Return a request of one task without a GPU, with all options of the partition."""
    return SlurmRequest(
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=cpus,
        minutes=min(minutes, partition.max_minutes or minutes),
        partition=partition.name,
        gpu_request=partition.gpu_request,
        gpu_type=partition.gpu_type,
        gres=partition.gres_extra,
        memory_mb={"per_node": memory_mb, "all": 0, "omit": None}[partition.memory],
        account=partition.account,
        qos=partition.qos,
        constraint=partition.constraint,
        reservation=partition.reservation,
        exclusive=partition.exclusive,
        threads_per_core=partition.threads_per_core,
        extra=partition.sbatch_extra,
    )
