"""Sets up a training process (device, NCCL or gloo groups, collective_timeout_s); sums, broadcasts, gathers over ranks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from longhaul.compat.cpuinfo import read_cpu_once_in_this_process
from longhaul.compat.deepspeed_ops import compile_without_debug_information, disable_shm_comm
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.runtime.compiled_ops import use_ops_folder
from longhaul.runtime.process_rank import Rank, require_planned_size, this_rank
from longhaul.runtime.rank_placement import bind_to_gpu_cores, computes_on_gpus, gpu_index
from longhaul.runtime.rendezvous import process_group
from longhaul.runtime.swap_folders import swap_folder
from longhaul.train.parallel.parallel_dims import ParallelDims, build_parallel_dims

Value = TypeVar("Value")


@dataclass(frozen=True)
class DistributedContext:
    """This process among its peers.

    device:  what this process computes on
    threads: CPU threads of torch in this process
    dims:    the parallel axes and this rank's place on each of them
    swap:    this process' swap folder; None where nothing is offloaded to a disk
    """

    rank: Rank
    device: torch.device
    threads: int
    dims: ParallelDims
    swap: Path | None = None

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank.is_main

    def sum(self, value: float) -> float:
        """Return the sum over all ranks in double precision; every rank gets the same bits."""
        return self.sums([value])[0]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over all ranks, with one collective."""
        return self.sums_on_device(values).tolist()

    def sums_on_device(self, values: Sequence[float | torch.Tensor]) -> torch.Tensor:
        """Return the sum of each value over all ranks in fp64. The CPU waits neither for it nor for earlier work."""
        totals = torch.stack([self._as_scalar(value) for value in values])
        torch.distributed.all_reduce(totals)
        return totals

    def _as_scalar(self, value: float | torch.Tensor) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.detach().double()
        # torch.tensor would copy the number from the CPU's memory, and wait for that copy.
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        torch.distributed.barrier()

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's value, small and picklable, on every rank."""
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, small and picklable, on every rank; in the order of the ranks."""
        values: list[Value] = [value] * self.rank.world_size
        torch.distributed.all_gather_object(values, value)
        return values


@contextmanager
def distributed_context(job: TrainSpec) -> Iterator[DistributedContext]:
    """Join all processes of the stage for the length of the block.

    Raises:
        UserError: the number of ranks or nodes differs from the plan, a rank does not arrive, or the network does not work.
    """
    rank = this_rank()
    require_planned_size(rank, job.world_size, job.stage.nodes)
    use_ops_folder(job.scratch)
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // max(1, job.stage.gpus_per_node)))
    torch.set_num_threads(threads)
    # DeepSpeed calls collectives by names that torch has deprecated, thousands of times.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    on_gpu = computes_on_gpus()
    device = torch.device("cuda", gpu_index(rank)) if on_gpu else torch.device("cpu")
    if not on_gpu or job.stage.compile == "off":
        # DeepSpeed decorates its Muon optimizer with torch.compile, which imports the compiler: that costs every rank a second.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if on_gpu and job.stage.deterministic:
        _use_deterministic_kernels()
    if job.bind_cores and on_gpu:
        cpus = bind_to_gpu_cores(job.stage.gpus_per_node, rank.local_rank)
        text = f"bound to the CPUs {cpus}" if cpus else "not bound: the job has fewer cores than ranks"
        print(f"rank {rank.rank}: {text}", flush=True)
    with (
        _own_swap_folder(job, rank) as swap,
        process_group(rank, "nccl" if on_gpu else "gloo", job.stage.recovery.collective_timeout_s),
    ):
        if not on_gpu or job.stage.zero.offload_optimizer != "none":  # DeepSpeed loads ops of the CPU
            read_cpu_once_in_this_process()
        _initialize_deepspeed(on_gpu)
        dims = build_parallel_dims(job.stage.parallel, rank.rank, rank.world_size)
        yield DistributedContext(rank, device, threads, dims, swap)


def _use_deterministic_kernels() -> None:
    """Let torch choose only kernels that add in the same order in every run.

    Attention's backward pass is the one that matters: cuDNN and flash attention add to the gradient of the queries from many
    thread blocks, in the order in which these finish. It must be called before the first matrix product.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch demands it
    torch.use_deterministic_algorithms(True)
    # A help for debugging, which costs a pass over new memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def _own_swap_folder(job: TrainSpec, rank: Rank) -> AbstractContextManager[Path | None]:
    if (
        not job.stage.zero.nvme_keys or job.scratch is None
    ):  # the plan refuses an offload to a disk without a scratch folder
        return nullcontext()
    return swap_folder(job.scratch, f"{job.run}-{job.stage.name}-rank-{rank.rank:05d}")


def _initialize_deepspeed(on_gpu: bool) -> None:
    """Make DeepSpeed use the process group that exists already."""
    import deepspeed

    compile_without_debug_information()
    if not on_gpu:
        disable_shm_comm()
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
