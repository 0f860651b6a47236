"""A rank that stops or dies in a collective of the fabric check: each other rank ends, and says in which collective it waited."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from longhaul.checks.hung_steps import COLLECTIVES_OF_RANKS, GPUS
from longhaul.config.site_config import FabricLimits
from longhaul.jobs.kinds.fabric_job import FabricSpec

_LIMIT_S = 2.5
_RANK = """
import os, sys
from dataclasses import replace
from pathlib import Path

from longhaul.checks import hung_steps

limit_s, signal_number = float(sys.argv[2]), int(sys.argv[3])  # before other modules import the limit
hung_steps.COLLECTIVES_OF_RANKS = replace(hung_steps.COLLECTIVES_OF_RANKS, limit_s=limit_s)

from longhaul.checks import collective_benchmarks, fabric
from longhaul.jobs.kinds.fabric_job import FabricSpec

def send(group, elements):
    if group.rank == 1:
        os.kill(os.getpid(), signal_number)
    return all_gather(group, elements)

all_gather = collective_benchmarks._all_gather
collective_benchmarks.COLLECTIVES = (collective_benchmarks.Collective("all_gather", send, lambda n: 1.0),)
fabric.run(FabricSpec.read(Path(sys.argv[1])))
"""

_GPU_THAT_DOES_NOT_OPEN = """
import sys, time
from dataclasses import replace
from pathlib import Path

from longhaul.checks import hung_steps

hung_steps.GPUS = replace(hung_steps.GPUS, limit_s=1.0)

import torch
from longhaul.checks import fabric
from longhaul.jobs.kinds.fabric_job import FabricSpec

torch.cuda.is_available = lambda: time.sleep(600)
fabric.run(FabricSpec.read(Path(sys.argv[1])))
"""


def start_rank(
    job: Path, rank: int, port: int, number: signal.Signals, program: str = _RANK, ranks: int = 2
) -> subprocess.Popen[str]:
    """Start a rank as the only one of node n<rank>."""
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                 "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": "1", "RANK": str(rank), "LOCAL_RANK": "0",
                 "SLURMD_NODENAME": f"n{rank}"}  # fmt: skip
    command = [sys.executable, "-c", program, str(job), str(_LIMIT_S), str(number.value)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | variables
    )


def fabric_job(folder: Path, nodes: int) -> Path:
    job = FabricSpec(
        run="r", nodes=nodes, gpus_per_node=1, limits=FabricLimits(), node_limits=FabricLimits(), baseline=None,
        pairs_only=False, bad_hardware="refuse", folder=str(folder), out=str(folder / "fabric.json"),
    )  # fmt: skip
    job.write(folder / "job.json")
    return folder / "job.json"


def test_gpu_that_cuda_cannot_open_is_named(tmp_path: Path):
    rank = start_rank(fabric_job(tmp_path, 1), 0, 0, signal.SIGKILL, _GPU_THAT_DOES_NOT_OPEN, ranks=1)
    error = rank.communicate(timeout=200)[1]
    assert rank.returncode == 1 and "n0: rank 0: first call into CUDA or ROCm: no end after 1" in error
    assert f"remedy: {GPUS.remedy}" in error


@pytest.mark.parametrize(
    ("number", "of_first", "of_second"),
    [
        (signal.SIGSTOP, f"no end after {_LIMIT_S}", f"no end after {_LIMIT_S}"),
        (signal.SIGKILL, "", "its process ended by SIGKILL"),
    ],
)
def test_rank_that_waits_in_a_collective_names_it(
    tmp_path: Path, number: signal.Signals, of_first: str, of_second: str
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = fabric_job(tmp_path, 2)
    ranks = [start_rank(job, rank, port, number) for rank in (0, 1)]
    errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], errors
    step = "all_gather of 8 bytes between all ranks: "
    assert f"rank 0{' on ' if number == signal.SIGKILL else ': '}" in errors[0] and step + of_first in errors[0]
    assert f"n1: rank 1: {step}{of_second}" in errors[1]
    assert all(f"remedy: {COLLECTIVES_OF_RANKS.remedy}" in error for error in errors)
