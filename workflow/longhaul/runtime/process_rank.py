"""Reads this process's rank from srun or torchrun, sets RANK and WORLD_SIZE, and checks the planned number of ranks."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from longhaul.errors import UserError
from longhaul.runtime.launcher_variables import launcher_variables
from longhaul.runtime.log_lines import StampedLines

_OF_TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


@dataclass(frozen=True)
class Rank:
    """One process of a distributed job. The ranks of one node are consecutive.

    nodes: number of nodes of the job
    """

    rank: int
    world_size: int
    local_rank: int
    nodes: int
    host: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def node_name(self) -> str:
        """Return Slurm's name of this node, by which later jobs exclude it; without Slurm the host name."""
        return os.environ.get("SLURMD_NODENAME") or self.host


def this_rank(environ: Mapping[str, str] = os.environ) -> Rank:
    """Return the rank of this process.

    An srun task takes precedence over torchrun, because the RANK of an outer launcher may be left in the environment.
    """
    host = socket.gethostname()
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        rank, world, local_rank, nodes = (
            int(environ[f"SLURM_{key}"]) for key in ("PROCID", "NTASKS", "LOCALID", "NNODES")
        )
        return Rank(rank, world, local_rank, nodes, host)
    if environ.keys() >= _OF_TORCHRUN:  # other launchers set some of them
        world, local_world = int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"]))
        return Rank(int(environ["RANK"]), world, int(environ["LOCAL_RANK"]), world // local_world, host)
    return Rank(0, 1, 0, 1, host)


def require_planned_size(rank: Rank, world_size: int, nodes: int) -> None:
    """Check that the job has the planned number of ranks and nodes.

    Raises:
        UserError: it has not; the message has both sizes.
    """
    if (rank.world_size, rank.nodes) != (world_size, nodes):
        raise UserError(
            f"this job runs {rank.world_size} ranks on {rank.nodes} nodes; the plan says {world_size} ranks on {nodes} nodes",
            "start it through its launch.sh, in an allocation of the planned size",
        )


def forget_launcher() -> None:
    """Remove the variables by which other libraries take this process for one of several.

    With LOCAL_RANK alone, accelerate waits for RANK; on CPUs it reads the sizes, too (accelerate/state.py). Cray's srun sets
    PMI_SIZE.
    """
    for name in launcher_variables(os.environ):
        del os.environ[name]


def export_rank(rank: Rank) -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK for torch.distributed and DeepSpeed. MASTER_* default to this host."""
    os.environ.update(RANK=str(rank.rank), WORLD_SIZE=str(rank.world_size), LOCAL_RANK=str(rank.local_rank))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port() if rank.world_size == 1 else 29500)


def exit_without_cleanup(code: int = 0) -> NoReturn:
    """Flush the output and end this process without finalizing the interpreter.

    During finalization, gloo's threads that need the interpreter sometimes abort the process ("terminate called without an
    active exception"). A job that has succeeded would then count as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, StampedLines):
            stream.end_line()
        stream.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
