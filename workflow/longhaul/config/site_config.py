"""The site file: partitions, GPU requests, network and software of a computing centre or of this machine."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from longhaul.config.field_types import (
    CudaBuild,
    EnvironmentVariableName,
    FrozenModel,
    HardwareCount,
    Minutes,
    Name,
    PositiveInt,
    SingleLine,
    SingleLineOrEmpty,
    SlurmConstraint,
    SlurmOption,
    SlurmWord,
)

# Variables that the launch script, srun, torchrun or the supervisor sets for each process.
_RESERVED_VARIABLES = {
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
# srun options that longhaul derives from the plan, and options with which a step does not run as the job that was planned.
_RESERVED_SRUN_OPTIONS = {
    "--chdir",
    "--error",
    "--export",
    "--gid",
    "--help",
    "--input",
    "--jobid",
    "--multi-prog",
    "--no-allocate",
    "--output",
    "--pty",
    "--test-only",
    "--uid",
    "--usage",
    "--version",
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

    name: SlurmWord = Field(description="Name of the partition, as `sinfo` shows it.")
    max_minutes: Minutes = Field(
        description="Time limit of the partition, in minutes or as `sinfo` shows it: hours:minutes:00 or days-hours:minutes:00."
    )
    max_nodes: HardwareCount | None = Field(
        default=None, description="Maximum number of nodes of one job; null: not checked."
    )


class Partitions(FrozenModel):
    """The Slurm partition for each kind of job."""

    gpu: Partition = Field(description="Partition for training.")
    cpu: Partition | None = Field(
        default=None, description="Partition for tokenizing and export; null: the gpu partition."
    )
    debug: Partition | None = Field(
        default=None, description="Partition for the environment and fabric checks; null: the gpu partition."
    )


class NodeShape(FrozenModel):
    """One node of the gpu partition."""

    cpus: HardwareCount = Field(description="Number of CPU cores that jobs may use.")
    memory_mb: PositiveInt = Field(description="CPU memory that jobs may use, in MiB.")
    gpus: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=0, description="Number of GPUs; 0: training runs on the CPU."
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


class FabricLimits(FrozenModel):
    """Limits of the fabric check. Bandwidth limits are minimum bus bandwidths at the largest message size, in GB/s."""

    all_reduce_gbps: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="Minimum bus bandwidth of all_reduce, in GB/s; null: no limit."
    )
    all_gather_gbps: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="Minimum bus bandwidth of all_gather, in GB/s; null: no limit."
    )
    reduce_scatter_gbps: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="Minimum bus bandwidth of reduce_scatter, in GB/s; null: no limit."
    )
    send_recv_gbps: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="Minimum bandwidth of send/recv between neighbouring ranks, in GB/s; null: no limit."
    )
    all_reduce_latency_us: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="Maximum duration of an all_reduce of 8 bytes, in microseconds; null: no limit."
    )


class Interconnect(FrozenModel):
    """The network between nodes."""

    kind: Literal["infiniband", "roce", "ethernet", "none"] = Field(
        default="ethernet",
        description="Type of network. infiniband, roce: each node of a job with several nodes must have an active port of this "
        "type. none: the site has one node.",
    )
    socket_interface: SlurmWord | None = Field(
        default=None, description="Network interface for the sockets of NCCL and gloo, for example ib0."
    )
    limits: FabricLimits = Field(default=FabricLimits(), description="Limits of the fabric check.")


class Software(FrozenModel):
    """The job environment. `launch.sh` activates it."""

    kind: Literal["current", "venv", "conda", "container", "modules"] = Field(
        default="current", description="Type of environment. current: the environment in which Snakemake runs."
    )
    path: SingleLine | None = Field(
        default=None,
        description="Absolute path. venv, conda: folder of the environment. container: image file.",
    )
    runtime: Literal["apptainer", "singularity"] = Field(
        default="apptainer", description="kind container: command that starts the container."
    )
    binds: tuple[SingleLine, ...] = Field(
        default=(),
        description="kind container: additional folders to bind, as `folder` or `from:to`. The checkout, run, storage, data and "
        "model folders are always bound.",
    )
    modules: tuple[SlurmWord, ...] = Field(
        default=(), description="Environment modules to load first, with every kind."
    )

    @model_validator(mode="after")
    def _check_paths(self) -> Software:
        if self.kind in ("venv", "conda", "container") and not self.path:
            raise ValueError(f"kind {self.kind} needs path")
        for key, path in (("path", self.path), *(("binds", path) for path in self.binds)):
            # A job starts in the working folder of its run, so a relative path would differ between runs.
            if path and not path.startswith("/"):
                raise ValueError(f"{key} {path!r} is not an absolute path; write a path that starts with /")
        if self.kind == "modules" and not self.modules:
            raise ValueError("kind modules needs modules")
        return self


class Site(FrozenModel):
    """A computing centre, or this machine."""

    name: Name = Field(description="Name of the site in plans and reports.")
    scheduler: Literal["slurm", "local"] = Field(
        default="slurm", description="slurm: jobs are submitted to Slurm. local: jobs are processes on this machine."
    )
    partitions: Partitions | None = Field(default=None, description="Slurm partitions. Required for scheduler slurm.")
    node: NodeShape = Field(description="Resources of one node.")
    max_nodes: HardwareCount = Field(description="Maximum number of nodes of one job.")
    account: SlurmWord | None = Field(default=None, description="Value of sbatch --account.")
    qos: SlurmWord | None = Field(default=None, description="Value of sbatch --qos.")
    constraint: SlurmConstraint | None = Field(default=None, description="Value of sbatch --constraint.")
    reservation: SlurmWord | None = Field(default=None, description="Value of sbatch --reservation.")
    gpu_request: Literal["gpus_per_node", "gres", "none"] = Field(
        default="gpus_per_node", description="Option that requests GPUs: --gpus-per-node, --gres, or no option."
    )
    gpu_type: SlurmWord | None = Field(default=None, description="GPU type in the request, for example a100.")
    memory: Literal["per_node", "all", "omit"] = Field(
        default="per_node",
        description="Memory request. per_node: node.memory_mb. all: --mem=0, the whole node. omit: no request.",
    )
    exclusive: bool = Field(default=False, description="Request whole nodes with sbatch --exclusive.")
    requeue: bool = Field(default=True, description="Slurm may requeue jobs.")
    deadline_poll_interval_s: Annotated[float, Field(ge=1, le=3600)] = Field(
        default=30.0, description="Interval at which a job asks Slurm for the end of its allocation, in seconds."
    )
    checkpoint_write_gb_per_s: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None,
        description="Write rate of all nodes together to the storage, in GB/s. The plan compares the time of one save with "
        "recovery.stop_margin_s; null: no comparison.",
    )
    sbatch_from_jobs: bool = Field(
        default=True, description="Compute nodes may call sbatch. false: controller.sbatch is not rendered."
    )
    srun_extra: tuple[SlurmOption, ...] = Field(
        default=(), description="Additional options for each srun command, for example --mpi=pmix."
    )
    interconnect: Interconnect = Field(default=Interconnect(), description="The network between nodes.")
    inode_limit: PositiveInt | None = Field(
        default=None,
        description="File quota of the run folder. The plan compares its file counts with it; null: no limit.",
    )
    software: Software = Field(default=Software(), description="The job environment.")
    cuda_build: CudaBuild = Field(
        default="cpu",
        description="Expected CUDA build of torch: cpu, cu128, cu130, … The environment check verifies it.",
    )
    environment: dict[EnvironmentVariableName, SingleLineOrEmpty] = Field(
        default={}, description="Environment variables for each job, for example NCCL_IB_HCA."
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> Site:
        if self.scheduler == "local" and self.max_nodes > 1:
            raise ValueError(
                f"max_nodes {self.max_nodes} with scheduler local: the local site is one machine; set it to 1"
            )
        if self.scheduler == "slurm" and self.partitions is None:
            raise ValueError("scheduler slurm needs partitions")
        if self.node.gpus and self.cuda_build == "cpu":
            raise ValueError(
                f"node.gpus {self.node.gpus} with cuda_build cpu: the CPU build of torch uses no GPU; set cuda_build, e.g. cu130"
            )
        if self.interconnect.kind == "none" and self.max_nodes > 1:
            raise ValueError(
                f"max_nodes {self.max_nodes} with interconnect.kind none: without a network a job has one node; change either"
            )
        if self.gpu_request == "gres" and not re.fullmatch(r"[A-Za-z0-9_.]*", self.gpu_type or ""):
            raise ValueError(
                f"gpu_type {self.gpu_type!r} with gpu_request gres: the Slurm plugin accepts only letters, digits, _ and ."
            )
        if self.gpu_request == "gres" and not self.node.gpus:
            raise ValueError(f"gpu_request gres needs node.gpus >= 1; it is {self.node.gpus}")
        return self

    @model_validator(mode="after")
    def _check_reserved_names(self) -> Site:
        if reserved := sorted(_RESERVED_VARIABLES & set(self.environment)):
            raise ValueError(
                f"environment sets {reserved[0]}, which longhaul sets for each job; remove it, or load a module instead"
            )
        for option in self.srun_extra:
            name = option.partition("=")[0]
            # srun also accepts the beginning of an option's name.
            if reserved := next((known for known in sorted(_RESERVED_SRUN_OPTIONS) if known.startswith(name)), None):
                also = "" if reserved == name else f" ({reserved})"
                raise ValueError(f"srun_extra contains {name}{also}, which longhaul sets for each step; remove it")
        return self
