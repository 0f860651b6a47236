"""How ranks meet: all of them, or with the names of those that are missing, in bounded time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from longhaul.runtime.rendezvous import node_names

WORKER = """
import sys, time, torch
from longhaul.errors import UserError
from longhaul.runtime.rank import this_rank
from longhaul.runtime.rendezvous import process_group
started = time.monotonic()
try:
    with process_group(this_rank(), "gloo", 30.0, meet_s=float(sys.argv[1])):
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        print("sum", int(total))
except UserError as error:
    print(error)
print("seconds", time.monotonic() - started)
"""


LATE_READER = """
import os, time
from torch.distributed import TCPStore
get = TCPStore.get
if os.environ["RANK"] == "1":
    TCPStore.get = lambda *arguments: (time.sleep(6.5), get(*arguments))[1]
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(ranks: list[int], world_size: int, meet_s: float = 20.0, worker: str = WORKER, **variables: str) -> list[str]:
    """What the given ranks print; the others never come."""
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **variables}
    started = []
    for rank in ranks:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        if "SLURM_STEP_ID" in variables:
            own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NTASKS": str(world_size)}
        command = [sys.executable, "-c", worker, str(meet_s)]
        started.append(subprocess.Popen(command, env={**shared, **own}, stdout=subprocess.PIPE, text=True))
    return [process.communicate(timeout=60)[0] for process in started]


def test_all_that_come_can_work():
    assert [output.splitlines()[0] for output in start([0, 1], 2)] == ["sum 2", "sum 2"]


def test_a_rank_that_does_not_come_is_named_with_its_node():
    slurm = {"SLURM_STEP_ID": "0", "SLURM_NNODES": "3", "SLURM_STEP_NODELIST": "n[1-2],gpu7"}
    for output in start([0, 1], 3, meet_s=2.0, **slurm):
        assert "1 of 3 ranks did not come within 2 s: 2, on gpu7" in output
        assert "remedy: look in the job's log" in output


def test_rank_0_stays_until_whoever_came_has_heard():
    """Its store ends with it: a rank that reads the verdict late would be told of a firewall."""
    for output in start([0, 1], 3, meet_s=5.0, worker=LATE_READER + WORKER):
        assert "1 of 3 ranks did not come within 5 s: 2" in output


def test_a_main_rank_that_does_not_come_is_named_with_its_address():
    (output,) = start([1], 2, meet_s=1.0)
    assert "rank 1 did not reach rank 0 at 127.0.0.1:" in output and "firewall" in output
    assert float(output.split()[-1]) < 30


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[01-03,7],gpu1", ["n01", "n02", "n03", "n7", "gpu1"]),
        ("r1n[9-11]-ib", ["r1n9-ib", "r1n10-ib", "r1n11-ib"]),
        ("", []),
    ],
)
def test_slurms_host_lists(nodelist: str, names: list[str]):
    assert node_names(nodelist) == names
