"""One request for an allocation: the only place that knows how it is spelled for Snakemake, for sbatch and for srun.

The same request gives a rule's `resources:` and the header of the rendered job.sbatch, so a job started by hand gets what
Snakemake would have asked for. Every job uses one form: `mpi=""` makes the executor plugin leave the rule's shell
unwrapped (it tests the value when it submits and the key's presence inside the job), and `--ntasks-per-node` in
`slurm_extra` spreads the tasks evenly. A test compares both spellings through the plugin's own command builder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# The plugin has no way to say --mem=0 (it drops a zero) and refuses the option in slurm_extra. Its command line goes
# through a shell, where the empty quotes vanish.
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
    """What one job asks Slurm for.

    memory_mb: None sends nothing, 0 asks for the whole node. exclude: nodes to leave out; () says that there are none, since
    the executor plugin would leave out every node of an earlier failure (the last --exclude wins); None says nothing.
    after_job: start when that job has ended.
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
        """The rule's `resources:`, in the executor plugin's words."""
        # With gres the plugin turns `tasks` into tasks per GPU; tasks_per_gpu=0 silences that.
        shape = {"gres": f"gpu:{self._gpus}", "tasks_per_gpu": 0} if self._uses_gres else {"tasks": self.tasks}
        resources = {
            "nodes": self.nodes,
            **shape,
            "mpi": "",
            "cpus_per_task": self.cpus_per_task,
            "runtime": self.minutes,
            "slurm_partition": self.partition,
            "slurm_extra": " ".join(self._extra()),
            "mem_mb": self.memory_mb or None,
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
        """Long sbatch options and their values; an empty value is a flag."""
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
        """The geometry of a job step over the whole allocation: spelled out, since the plugin strips SLURM_* variables."""
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
