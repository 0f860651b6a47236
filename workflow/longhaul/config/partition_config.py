"""Keys of one partition in the site file: account, qos, constraint, GPU request, memory, binding, and the shape of a node."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from longhaul.config.field_types import (
    BindValue,
    FrozenModel,
    HardwareCount,
    Minutes,
    PositiveInt,
    SbatchOption,
    SlurmConstraint,
    SlurmWord,
)
from longhaul.config.slurm_options import RESERVED_SBATCH_OPTIONS, check_options, is_option

JobPlace = Literal["gpu", "cpu", "debug", "login"]
"""Kind of job that a partition serves. It also names where the job runs when no partition serves its kind."""


class NodeShape(FrozenModel):
    """Hardware of one node that one job may use."""

    cpus: HardwareCount = Field(
        description="Number of CPU cores that one job may use. CPU jobs with few cores ask for fewer."
    )
    memory_mb: PositiveInt = Field(description="CPU memory that one job may use, in MiB.")
    gpus: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=0,
        description="Number of GPUs; 0: training runs on the CPU. An AMD card with two dies counts as two GPUs.",
    )
    gpu_memory_gib: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="Memory of one GPU, in GiB; null: the plan does not check memory."
    )
    gpu_peak_tflops: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None,
        description="Dense bf16 rate of one GPU from its datasheet, in TFLOP/s. Used for MFU and for estimates of GPU hours.",
    )

    @model_validator(mode="after")
    def _check_cpus(self) -> NodeShape:
        if self.gpus > self.cpus:
            raise ValueError(f"cpus {self.cpus} is less than gpus {self.gpus}; each GPU's process needs one core")
        return self


def _check_signal(option: str) -> None:
    if not is_option(option, "--signal"):
        return
    value = option.partition("=")[2]
    if "B:" in value:
        # Snakemake's process in the batch step would receive the signal and end the job.
        raise ValueError(f"sbatch_extra contains {option}: a signal to the batch shell ends the job; remove B:")
    if re.fullmatch(r"(R:)?(SIG)?(TERM|15)(@[0-9]+)?", value) is None:
        raise ValueError(
            f"sbatch_extra contains {option}: longhaul saves and stops at SIGTERM; another signal ends the ranks without a save; "
            "write --signal=TERM@<seconds>"
        )


def _is_gpu(resource: str) -> bool:
    """Return whether a generic resource is a GPU, such as gpu, gpu:2 or gres:gpu:a100:2; gpu_mem is another one."""
    return re.match(r"(gres[:/])?gpu(?![\w-])", resource) is not None


class Partition(FrozenModel):
    """One partition: its nodes, and what its jobs ask Slurm for."""

    jobs: Annotated[tuple[JobPlace, ...], Field(min_length=1)] = Field(
        description="Kinds of jobs that run here. gpu: training. cpu: tokenizing and export; default: a share of a gpu node. "
        "debug: environment and fabric checks; default: as gpu. login: the controller job; default: as cpu."
    )
    name: SlurmWord | None = Field(
        default=None,
        description="Value of sbatch --partition, also several names as `a,b`; null: no option, Slurm or the QOS chooses.",
    )
    account: SlurmWord | None = Field(default=None, description="Value of sbatch --account.")
    qos: SlurmWord | None = Field(default=None, description="Value of sbatch --qos.")
    constraint: SlurmConstraint | None = Field(default=None, description="Value of sbatch --constraint.")
    reservation: SlurmWord | None = Field(default=None, description="Value of sbatch --reservation.")
    exclusive: bool = Field(default=False, description="Request whole nodes with sbatch --exclusive.")
    max_minutes: Minutes | None = Field(
        default=None,
        description="Time limit, in minutes or as `sinfo` shows it: hours:minutes:00 or days-hours:minutes:00. Required for "
        "scheduler slurm.",
    )
    max_nodes: HardwareCount = Field(default=1, description="Maximum number of nodes of one job.")
    node: NodeShape = Field(description="Hardware of one node that one job may use.")
    gpu_request: Literal["gpus_per_node", "gres", "none"] = Field(
        default="gpus_per_node", description="Option that requests GPUs: --gpus-per-node, --gres, or no option."
    )
    gpu_type: SlurmWord | None = Field(default=None, description="GPU type in the request, for example a100.")
    gres_extra: tuple[SlurmWord, ...] = Field(
        default=(), description="Further generic resources of each node, for example nvme:100 for 100 GB of local disk."
    )
    memory: Literal["per_node", "all", "omit"] = Field(
        default="per_node",
        description="Memory request. per_node: node.memory_mb. all: --mem=0, the whole node. omit: no request.",
    )
    threads_per_core: Annotated[int, Field(ge=1, le=8)] | None = Field(
        default=None, description="Value of sbatch and srun --threads-per-core; 1: no hyperthreads. null: no option."
    )
    cpu_bind: BindValue | None = Field(
        default=None,
        description="Binding of the training step to cores: a value of srun --cpu-bind, or auto: each rank takes whole cores, "
        "its part of those next to its GPU. Masks and maps apply to whole nodes. Other steps then run with --cpu-bind=none. "
        "null: no option. For jobs gpu only.",
    )
    gpu_bind: BindValue | None = Field(
        default=None,
        description="Value of srun --gpu-bind for the training step, for example none or closest; null: no option. Masks and "
        "maps apply to whole nodes. For jobs gpu only.",
    )
    sbatch_extra: tuple[SbatchOption, ...] = Field(
        default=(), description="Additional sbatch options, for example --mail-type=END or --licenses=scratch."
    )

    @property
    def title(self) -> str:
        """Return what messages call the partition."""
        return f"partition {self.name}" if self.name else f"the partition for {', '.join(self.jobs)} jobs"

    def _key_that_excludes_hint(self) -> str | None:
        return "threads_per_core" if self.threads_per_core else "cpu_bind" if self.cpu_bind else None

    @model_validator(mode="after")
    def _check_options(self) -> Partition:
        check_options("sbatch_extra", self.sbatch_extra, RESERVED_SBATCH_OPTIONS)
        for option in self.sbatch_extra:
            _check_signal(option)
            if is_option(option, "--hint") and (other := self._key_that_excludes_hint()):
                raise ValueError(
                    f"sbatch_extra contains {option}, which Slurm refuses with {other}; remove one of them"
                )
            if is_option(option, "--oversubscribe") and self.exclusive:
                raise ValueError(
                    f"sbatch_extra contains {option}, which contradicts exclusive true; remove one of them"
                )
        if (self.cpu_bind or self.gpu_bind) and "gpu" not in self.jobs:
            key = "cpu_bind" if self.cpu_bind else "gpu_bind"
            raise ValueError(
                f"{key} has no effect on a partition without the jobs gpu: only training is bound; remove it"
            )
        if self.cpu_bind == "auto" and self.gpu_bind not in (None, "none"):
            raise ValueError(
                f"cpu_bind auto with gpu_bind {self.gpu_bind}: a rank must see all GPUs; set gpu_bind to none"
            )
        return self

    @model_validator(mode="after")
    def _check_gpu_request(self) -> Partition:
        if self.gpu_request == "gres" and not self.node.gpus:
            raise ValueError(f"gpu_request gres needs node.gpus >= 1; it is {self.node.gpus}")
        for key, value in (("gpu_type", self.gpu_type), ("gpu_bind", self.gpu_bind)):
            if value and not self.node.gpus:
                raise ValueError(f"{key} {value} has no effect with node.gpus 0; set node.gpus, or remove {key}")
        if ":" in (self.gpu_type or ""):
            raise ValueError(
                f"gpu_type {self.gpu_type} contains more than the type; write the word between the colons of gpu:a100:4 alone"
            )
        if self.gpu_type and self.gpu_request == "none":
            raise ValueError(
                f"gpu_type {self.gpu_type} has no effect with gpu_request none; remove it, or set gpu_request to gres"
            )
        asks_for_gpus = self.node.gpus and self.gpu_request != "none"
        resources = [resource for item in self.gres_extra for resource in item.split(",")]
        if asks_for_gpus and (gpus := next((name for name in resources if _is_gpu(name)), None)):
            raise ValueError(
                f"gres_extra contains {gpus}, but gpu_request {self.gpu_request} asks for GPUs already; remove it from gres_extra"
            )
        return self
