"""Keys of the site file: scheduler, requeue, interconnect with limits, environment variables, quotas; partitions are in
partition_config.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from longhaul.config.field_types import (
    HOST_SUFFIX_PATTERN,
    EnvironmentVariableName,
    FrozenModel,
    Name,
    PositiveInt,
    SingleLine,
    SingleLineOrEmpty,
    SlurmOption,
    SlurmWord,
    item_name,
)
from longhaul.config.node_minimums import NodeMinimums
from longhaul.config.partition_config import JobPlace, NodeShape, Partition
from longhaul.config.site_serving_config import Serving
from longhaul.config.slurm_options import RESERVED_SRUN_EXTRA, check_options
from longhaul.config.software_config import Accelerator, AcceleratorOrCpu, Software
from longhaul.runtime.launcher_variables import launcher_variables, srun_variables

# Where the jobs of a kind run when no partition serves that kind.
_FALLBACKS: dict[JobPlace, JobPlace] = {"login": "cpu", "cpu": "gpu", "debug": "gpu"}
_RESERVED_VARIABLES = {"PATH", "PYTHONPATH", "SLURM_JOB_ID"}

_MOST_GB_PER_S = 5000.0
"""More than the NVLink of any GPU has: 1,800 GB/s of Blackwell in both directions."""


def _in_gb_per_s(value: float) -> float:
    if value > _MOST_GB_PER_S:
        raise ValueError(
            f"{value:g} is above {_MOST_GB_PER_S:,.0f} GB/s, more than any GPU reaches; write GB/s (1,000 MB/s, or 8 Gbit/s)"
        )
    return value


BusBandwidth = Annotated[
    float, Field(gt=0, json_schema_extra={"maximum": _MOST_GB_PER_S}), AfterValidator(_in_gb_per_s)
]


class FabricLimits(FrozenModel):
    """Limits of the fabric check. Bandwidth limits are minimum bus bandwidths at the largest message size, in GB/s."""

    all_reduce_gbps: BusBandwidth | None = Field(
        default=None, description="Minimum bus bandwidth of all_reduce, in GB/s; null: no limit."
    )
    all_gather_gbps: BusBandwidth | None = Field(
        default=None, description="Minimum bus bandwidth of all_gather, in GB/s; null: no limit."
    )
    reduce_scatter_gbps: BusBandwidth | None = Field(
        default=None, description="Minimum bus bandwidth of reduce_scatter, in GB/s; null: no limit."
    )
    all_to_all_gbps: BusBandwidth | None = Field(
        default=None, description="Minimum bus bandwidth of all_to_all, in GB/s; null: no limit."
    )
    broadcast_gbps: BusBandwidth | None = Field(
        default=None, description="Minimum bus bandwidth of broadcast, in GB/s; null: no limit."
    )
    send_recv_gbps: BusBandwidth | None = Field(
        default=None, description="Minimum bandwidth of send/recv between neighbouring ranks, in GB/s; null: no limit."
    )
    all_reduce_latency_us: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None,
        description="Maximum duration of an all_reduce of 8 bytes, in microseconds; null: no limit. "
        "50 over 8 nodes, as guides say, is for RDMA.",
    )


class MasterAddress(FrozenModel):
    """The address under which all ranks reach rank 0; without a key it is the host name of the first node."""

    suffix: Annotated[str, StringConstraints(pattern=HOST_SUFFIX_PATTERN)] | None = Field(
        default=None, description="Text after the host name, for example i for the InfiniBand names of JSC."
    )
    interface: SlurmWord | None = Field(
        default=None,
        description="Network interface of the first node, for example ib0. The address is its IPv4 address.",
    )

    @model_validator(mode="after")
    def _check_one(self) -> MasterAddress:
        if self.suffix and self.interface:
            raise ValueError("names both suffix and interface; remove one of them")
        return self


class Interconnect(FrozenModel):
    """The network between nodes."""

    kind: Literal["infiniband", "roce", "ethernet", "none"] = Field(
        default="ethernet",
        description="Type of network. infiniband, roce: each node of a job with several nodes must have an active port of this "
        "type. ethernet: also Slingshot. none: the site has one node.",
    )
    socket_interface: SlurmWord | None = Field(
        default=None, description="Network interface for the sockets of NCCL, RCCL and gloo, for example ib0."
    )
    master_address: MasterAddress = Field(
        default=MasterAddress(), description="The address of rank 0; default: the host name of the first node."
    )
    nvlink_multicast: Literal["auto", "off"] = Field(
        default="auto",
        description="NVLink multicast (NVLS) of NCCL, torch and NVSHMEM, a resource of the whole node. auto: off in jobs on "
        "several, but not all, GPUs of a node that is not exclusive. off: never used, for containers and virtual machines "
        "that have a part of a host's GPUs.",
    )
    nccl_tests: SingleLine | None = Field(
        default=None,
        description="Absolute path of the folder with the programs of nccl-tests or rccl-tests on the nodes, for "
        "example /opt/nccl-tests/build. The fabric check runs them outside of any container, in addition to its own "
        "collectives; null: its own alone.",
    )
    limits: FabricLimits = Field(
        default=FabricLimits(), description="Limits of the fabric check for collectives between all ranks."
    )
    node_limits: FabricLimits = Field(
        default=FabricLimits(),
        description="Limits of the fabric check for collectives between the ranks of one node, of checks of several nodes.",
    )

    @model_validator(mode="after")
    def _check_path(self) -> Interconnect:
        if self.nccl_tests and not self.nccl_tests.startswith("/"):
            raise ValueError(f"nccl_tests {self.nccl_tests!r} is not an absolute path; write a path that starts with /")
        return self


class Site(FrozenModel):
    """A computing centre, or this machine."""

    name: Name = Field(description="Name of the site in plans and reports.")
    scheduler: Literal["slurm", "local"] = Field(
        default="slurm", description="slurm: jobs are submitted to Slurm. local: jobs are processes on this machine."
    )
    partitions: Annotated[tuple[Partition, ...], Field(min_length=1)] = Field(
        description="Where each kind of job runs. Each kind is in one partition at most; gpu is required. Scheduler local: one "
        "partition that describes this machine."
    )
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
    node_minimums: NodeMinimums = Field(
        default=NodeMinimums(),
        description="The least that a healthy node reaches. `longhaul baseline` learns what is usual at the site instead.",
    )
    inode_limit: PositiveInt | None = Field(
        default=None,
        description="File quota of the run folder. The plan compares its file counts with it; null: no limit.",
    )
    software: Software = Field(default=Software(), description="The job environment.")
    serving: Serving = Field(default=Serving(), description="The inference engine that serves exports.")
    accelerator: AcceleratorOrCpu = Field(
        default=Accelerator(),
        description="Build of torch: `cpu`, or a section with the version of CUDA or ROCm. The environment check verifies it.",
    )
    environment: dict[EnvironmentVariableName, SingleLineOrEmpty] = Field(
        default={}, description="Environment variables for each job, for example NCCL_IB_HCA."
    )

    @property
    def node(self) -> NodeShape:
        """One node of the partition for training."""
        return self.partition_for("gpu").node

    def partition_for(self, kind: JobPlace) -> Partition:
        """Return the partition that serves a kind of job, or the one that replaces it."""
        found = next((partition for partition in self.partitions if kind in partition.jobs), None)
        return found or self.partition_for(_FALLBACKS[kind])

    # pydantic has no location for the validators below: each of their messages begins with the key.
    def _key_of(self, partition: Partition) -> str:
        names = [other.name for other in self.partitions]
        return f"partitions.{item_name(names, self.partitions.index(partition))}"

    @model_validator(mode="after")
    def _check_partitions(self) -> Site:
        kinds = Counter(kind for partition in self.partitions for kind in partition.jobs)
        if twice := [kind for kind, count in kinds.items() if count > 1]:
            raise ValueError(f"partitions name the jobs {twice[0]} {kinds[twice[0]]} times; remove it from all but one")
        if "gpu" not in kinds:
            raise ValueError("partitions: no partition has jobs: [gpu], which training needs; add gpu to one of them")
        for partition in self.partitions:
            if self.scheduler == "slurm" and partition.max_minutes is None:
                raise ValueError(f"{self._key_of(partition)}.max_minutes is missing; scheduler slurm needs it")
        return self

    @model_validator(mode="after")
    def _check_consistency(self) -> Site:
        gpu = self.partition_for("gpu")
        if self.scheduler == "local" and (len(self.partitions) > 1 or gpu.max_nodes > 1):
            raise ValueError("scheduler local: the site is one machine; write one partition with max_nodes 1")
        if self.scheduler == "local" and self.software.kind == "srun":
            raise ValueError(
                "software.kind srun with scheduler local: Slurm starts such containers; use kind container"
            )
        if gpu.node.gpus and self.accelerator.build == "cpu":
            raise ValueError(
                f"{self._key_of(gpu)}.node.gpus {gpu.node.gpus} with accelerator cpu: the CPU build of torch uses no GPU; set "
                'accelerator, e.g. {cuda: "13.0"}, or remove node.gpus if there are no GPUs'
            )
        if not gpu.node.gpus and self.accelerator.build != "cpu":
            raise ValueError(
                f"{self._key_of(gpu)}.node.gpus 0 with accelerator {self.accelerator.build}: training would ask for no GPU; set "
                "node.gpus, or set accelerator to cpu if there are no GPUs"
            )
        debug = self.partition_for("debug")
        if gpu.node.gpus and not debug.node.gpus:
            raise ValueError(
                f"{self._key_of(debug)}.jobs: debug jobs test GPUs, and this partition has none; give debug to another one"
            )
        if self.interconnect.kind == "none" and gpu.max_nodes > 1:
            raise ValueError(
                f"{self._key_of(gpu)}.max_nodes {gpu.max_nodes} with interconnect.kind none: without a network a job has one "
                "node; change either"
            )
        return self

    @model_validator(mode="after")
    def _check_units(self) -> Site:
        minimum, peak = self.node_minimums.matrix_tflops, self.node.gpu_peak_tflops
        if minimum and peak and minimum > peak:
            raise ValueError(
                f"node_minimums.matrix_tflops {minimum:g} is above node.gpu_peak_tflops {peak:g} of "
                f"{self._key_of(self.partition_for('gpu'))}; both are in TFLOP/s"
            )
        return self

    @model_validator(mode="after")
    def _check_keys_of_nvidia(self) -> Site:
        if self.accelerator.cuda:
            return self
        build = self.accelerator.build
        if self.node_minimums.nvlinks is not None:
            raise ValueError(
                f"node_minimums.nvlinks {self.node_minimums.nvlinks} with accelerator {build}: only NVIDIA GPUs have NVLinks; "
                "remove it"
            )
        if self.interconnect.nvlink_multicast == "off":
            raise ValueError(
                f"interconnect.nvlink_multicast off with accelerator {build}: only NVIDIA GPUs have NVLinks; remove it"
            )
        return self

    @model_validator(mode="after")
    def _check_reserved_names(self) -> Site:
        if reserved := sorted(_RESERVED_VARIABLES & set(self.environment)):
            raise ValueError(
                f"environment sets {reserved[0]}, which longhaul sets for each job; remove it, or load a module instead"
            )
        if of_launchers := [*launcher_variables(self.environment), *srun_variables(self.environment)]:
            raise ValueError(
                f"environment sets {of_launchers[0]}, which srun, torchrun or another launcher sets for each process; remove it"
            )
        check_options("srun_extra", self.srun_extra, RESERVED_SRUN_EXTRA)
        return self
