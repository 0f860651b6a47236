"""What a computing centre is like: partitions, how GPUs are asked for, its network, its software."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from longhaul.config.field_types import (
    Constraint,
    Count,
    CudaBuild,
    EnvironmentName,
    FrozenModel,
    MachineCount,
    Name,
    OneLine,
    OneLineOrEmpty,
    SlurmOption,
    SlurmWord,
)

# What the launch script, srun, torchrun or the supervisor gives a process, and the plan's geometry of a step.
_OWN_VARIABLES = {
    "PATH",
    "PYTHONPATH",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NTASKS",
    "SLURM_JOB_ID",
}
_OWN_OPTIONS = {
    "--nodes",
    "--ntasks",
    "--ntasks-per-node",
    "--cpus-per-task",
    "--gpus-per-node",
    "--gres",
    "--nodelist",
    "--kill-on-bad-exit",
    "--wait",
}


class Partition(FrozenModel):
    """One Slurm partition."""

    name: SlurmWord = Field(description="Its name, as in sinfo.")
    max_minutes: Count = Field(description="Its time limit.")
    max_nodes: MachineCount | None = Field(default=None, description="Largest job, in nodes; null: not checked.")


class Partitions(FrozenModel):
    """Which partition serves which kind of job."""

    gpu: Partition = Field(description="Training, fabric and environment checks.")
    cpu: Partition | None = Field(default=None, description="Tokenizing and conversion; default: the gpu partition.")
    debug: Partition | None = Field(default=None, description="Short checks; default: the gpu partition.")


class NodeShape(FrozenModel):
    """One node of the gpu partition."""

    cpus: MachineCount = Field(description="CPU cores that jobs may use.")
    memory_mb: Count = Field(description="Memory that jobs may use, in MiB.")
    gpus: Annotated[int, Field(ge=0, le=1000)] = Field(default=0, description="GPUs; 0: training runs on the CPU.")
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = Field(default=None, description="Memory of one GPU.")
    gpu_peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Dense bf16 rate of one GPU from its datasheet, in TFLOP/s, for MFU."
    )

    @model_validator(mode="after")
    def _a_core_for_a_gpu(self) -> NodeShape:
        if self.gpus > self.cpus:
            raise ValueError(f"cpus {self.cpus} are fewer than gpus {self.gpus}; every GPU's process needs a core")
        return self


class FabricLimits(FrozenModel):
    """Smallest acceptable bus bandwidth of each collective at the largest size, in GB/s; null: not judged."""

    all_reduce_gbps: Annotated[float, Field(gt=0)] | None = Field(default=None, description="all_reduce.")
    all_gather_gbps: Annotated[float, Field(gt=0)] | None = Field(default=None, description="all_gather.")
    reduce_scatter_gbps: Annotated[float, Field(gt=0)] | None = Field(default=None, description="reduce_scatter.")
    send_recv_gbps: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="send/recv between neighbours."
    )
    all_reduce_latency_us: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Largest all_reduce time at 8 bytes, in microseconds."
    )


class Interconnect(FrozenModel):
    """The network between nodes."""

    kind: Literal["infiniband", "roce", "ethernet", "none"] = Field(
        default="ethernet",
        description="infiniband, roce: every node of several must have an active port of it. none: one machine.",
    )
    socket_interface: SlurmWord | None = Field(
        default=None, description="Interface for NCCL's and gloo's sockets, e.g. ib0."
    )
    limits: FabricLimits = Field(default=FabricLimits(), description="What the fabric check demands.")


class Software(FrozenModel):
    """How a job enters the job environment; `launch.sh` does it."""

    kind: Literal["current", "venv", "conda", "container", "modules"] = Field(
        default="current", description="current: the environment Snakemake itself runs in."
    )
    path: OneLine | None = Field(
        default=None, description="venv: its folder. conda: the environment's folder. container: the image."
    )
    runtime: Literal["apptainer", "singularity"] = Field(default="apptainer", description="container: the command.")
    binds: tuple[OneLine, ...] = Field(
        default=(),
        description="container: more folders to bind (or `from:to`) than those of checkout, run, storage, data and models.",
    )
    modules: tuple[SlurmWord, ...] = Field(default=(), description="Modules loaded first, whatever the kind.")

    @model_validator(mode="after")
    def _needs_path(self) -> Software:
        if self.kind in ("venv", "conda", "container") and not self.path:
            raise ValueError(f"kind {self.kind} needs path")
        for key, path in (("path", self.path), *(("binds", path) for path in self.binds)):
            # jobs start in the run's working folder, which is another one for every run
            if path and not path.startswith("/"):
                raise ValueError(f"{key} {path!r} is not absolute; write it from / on")
        if self.kind == "modules" and not self.modules:
            raise ValueError("kind modules needs modules")
        return self


class Site(FrozenModel):
    """A computing centre, or this machine."""

    name: Name = Field(description="Shown in plans and reports.")
    scheduler: Literal["slurm", "local"] = Field(
        default="slurm", description="local: processes on this machine, no Slurm."
    )
    partitions: Partitions | None = Field(default=None, description="Needed for slurm.")
    node: NodeShape = Field(description="Shape of one node.")
    max_nodes: MachineCount = Field(description="Most nodes one job may use.")
    account: SlurmWord | None = Field(default=None, description="--account.")
    qos: SlurmWord | None = Field(default=None, description="--qos.")
    constraint: Constraint | None = Field(default=None, description="--constraint.")
    reservation: SlurmWord | None = Field(default=None, description="--reservation.")
    gpu_request: Literal["gpus_per_node", "gres", "none"] = Field(
        default="gpus_per_node", description="How GPUs are asked for: --gpus-per-node, --gres, or not at all."
    )
    gpu_type: SlurmWord | None = Field(default=None, description="Type in the request, e.g. a100.")
    memory: Literal["per_node", "all", "omit"] = Field(
        default="per_node", description="per_node: the node's memory_mb. all: --mem=0, the whole node. omit: not sent."
    )
    exclusive: bool = Field(default=False, description="--exclusive.")
    requeue: bool = Field(default=True, description="Jobs may be requeued.")
    deadline_poll_interval_s: Annotated[float, Field(ge=1)] = Field(
        default=30.0, description="How often a job asks Slurm for the end of its allocation, in seconds."
    )
    checkpoint_write_gb_per_s: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="What all nodes together write to the storage, in GB/s; the plan compares a save to recovery.stop_margin_s.",
    )
    sbatch_from_jobs: bool = Field(
        default=True, description="Compute nodes may call sbatch; false: no controller.sbatch is rendered."
    )
    srun_extra: tuple[SlurmOption, ...] = Field(default=(), description="More options for every srun, e.g. --mpi=pmix.")
    interconnect: Interconnect = Field(default=Interconnect(), description="The network between nodes.")
    inode_limit: Count | None = Field(
        default=None, description="File quota of the run folder; the plan compares with it."
    )
    software: Software = Field(default=Software(), description="The job environment.")
    cuda_build: CudaBuild = Field(
        default="cpu", description="torch's build: cpu, cu128, cu130, …; the environment check compares."
    )
    environment: dict[EnvironmentName, OneLineOrEmpty] = Field(
        default={}, description="Variables for every job, e.g. NCCL_IB_HCA."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Site:
        if self.scheduler == "local" and self.max_nodes > 1:
            raise ValueError(f"scheduler local is this machine, and max_nodes is {self.max_nodes}; set it to 1")
        if self.scheduler == "slurm" and self.partitions is None:
            raise ValueError("scheduler slurm needs partitions")
        if self.node.gpus and self.cuda_build == "cpu":
            raise ValueError(
                f"node.gpus {self.node.gpus} with cuda_build cpu: torch's CPU build uses no GPU; set cuda_build, e.g. cu130"
            )
        if self.interconnect.kind == "none" and self.max_nodes > 1:
            raise ValueError(f"interconnect.kind none is one machine, and max_nodes is {self.max_nodes}; set either")
        if self.gpu_request == "gres" and not re.fullmatch(r"[A-Za-z0-9_.]*", self.gpu_type or ""):
            raise ValueError(
                f"gpu_type {self.gpu_type!r}: Snakemake's Slurm plugin takes letters, digits, _ and . in a gres"
            )
        if self.gpu_request == "gres" and not self.node.gpus:
            raise ValueError("gpu_request gres needs node.gpus >= 1")
        return self

    @model_validator(mode="after")
    def _leaves_ours_alone(self) -> Site:
        if taken := sorted(_OWN_VARIABLES & set(self.environment)):
            raise ValueError(f"environment sets {taken[0]}, which is set for every job; drop it, or load a module")
        for option in self.srun_extra:
            if (name := option.partition("=")[0]) in _OWN_OPTIONS:
                raise ValueError(f"srun_extra holds {name}, which follows from the plan; drop it")
        return self
