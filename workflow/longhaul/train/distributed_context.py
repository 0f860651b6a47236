"""The processes of a training: who this one is, what it computes on, and the few sums they share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from longhaul.jobs.specs import TrainSpec
from longhaul.runtime.compiled_ops import compile_without_debug_information, disable_shm_comm, use_ops_folder
from longhaul.runtime.rank import Rank, require_geometry, this_rank
from longhaul.runtime.rendezvous import process_group
from longhaul.runtime.swap_folders import swap_folder
from longhaul.train.parallel.parallel_dims import ParallelDims, make_parallel_dims


@dataclass(frozen=True)
class DistributedContext:
    """This process among its peers; `dims` says which of them share its samples, and which its part of the model.

    `swap` is this process' own folder for states that are offloaded to a disk.
    """

    rank: Rank
    device: torch.device
    threads: int
    dims: ParallelDims
    swap: Path | None = None

    @property
    def is_main(self) -> bool:
        return self.rank.is_main

    def sum(self, value: float) -> float:
        """The sum over all ranks, in double precision: the same bits on each."""
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.item()

    def barrier(self) -> None:
        torch.distributed.barrier()

    def broadcast(self, value):
        """Rank 0's (small, picklable) value on every rank."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value) -> list:
        """Every rank's (small, picklable) value, on every rank."""
        values = [None] * self.rank.world_size
        torch.distributed.all_gather_object(values, value)
        return values


@contextmanager
def distributed_context(job: TrainSpec) -> Iterator[DistributedContext]:
    """All processes of the stage for the length of the block.

    Raises:
        UserError: another number of ranks or nodes than planned, ranks that do not come, a network that does not work.
    """
    rank = this_rank()
    require_geometry(rank, job.world_size, job.stage.nodes)
    use_ops_folder(job.scratch)
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // max(1, job.stage.gpus_per_node)))
    torch.set_num_threads(threads)
    # Nothing here is compiled, but DeepSpeed decorates its Muon so, which imports the compiler: a second of every rank.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # DeepSpeed still calls collectives by names that torch has deprecated, thousands of times.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", rank.local_rank) if on_gpu else torch.device("cpu")
    with (
        _swap_folder(job, rank) as swap,
        process_group(rank, "nccl" if on_gpu else "gloo", job.stage.recovery.collective_timeout_s),
    ):
        _join_deepspeed(on_gpu)
        yield DistributedContext(
            rank, device, threads, make_parallel_dims(job.stage.parallel, rank.rank, rank.world_size), swap
        )


def _swap_folder(job: TrainSpec, rank: Rank) -> AbstractContextManager[Path | None]:
    if not job.stage.zero.on_disk or job.scratch is None:  # the plan refuses the one without the other
        return nullcontext()
    return swap_folder(job.scratch, f"{job.run}-{job.stage.name}-rank-{rank.rank:05d}")


def _join_deepspeed(on_gpu: bool) -> None:
    """Has DeepSpeed use the process group that is there."""
    import deepspeed

    compile_without_debug_information()
    if not on_gpu:
        disable_shm_comm()
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
