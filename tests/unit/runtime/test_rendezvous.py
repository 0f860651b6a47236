"""The rendezvous: it succeeds, or it names the missing ranks, in bounded time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longhaul.errors import UserError
from longhaul.runtime import rendezvous
from longhaul.runtime.process_rank import Rank
from longhaul.runtime.rendezvous import parse_node_list, process_group

WORKER = """
import sys, time, torch
from longhaul.errors import UserError
from longhaul.runtime.process_rank import this_rank
from longhaul.runtime.rendezvous import process_group
print("ready", flush=True)
sys.stdin.readline()  # all ranks begin together, however long their imports took
started = time.monotonic()
try:
    with process_group(this_rank(), "gloo", 30.0, rendezvous_timeout_s=float(sys.argv[1])):
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


def start(
    ranks: list[int], world_size: int, timeout_s: float = 20.0, worker: str = WORKER, **variables: str
) -> list[str]:
    """Return what the given ranks print; the other ranks never start."""
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **variables}
    started = []
    for rank in ranks:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        if "SLURM_STEP_ID" in variables:
            own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NTASKS": str(world_size)}
        command = [sys.executable, "-c", worker, str(timeout_s)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, env={**shared, **own}, text=True, **pipes))
    for process in started:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate(timeout=60)[0] for process in started]


def test_complete_group_can_communicate():
    assert [output.splitlines()[0] for output in start([0, 1], 2)] == ["sum 2", "sum 2"]


def test_missing_rank_is_named_with_its_node():
    slurm = {"SLURM_STEP_ID": "0", "SLURM_NNODES": "3", "SLURM_STEP_NODELIST": "n[1-2],gpu7"}
    for output in start([0, 1], 3, timeout_s=2.0, **slurm):
        assert "1 of 3 ranks did not arrive within 2 s: 2, on gpu7" in output
        assert "remedy: read in the job's log" in output


WITH_SHORT_USUAL_TIME = """
from longhaul.runtime import rendezvous
rendezvous.RENDEZVOUS_TIMEOUT_S = 1.0
"""


def test_rank_that_has_more_than_the_usual_time_is_named_before_its_end():
    """In the node check, other nodes may wait for hung steps. The log says early which one never started."""
    first, other = start([0, 1], 3, timeout_s=3.0, worker=WITH_SHORT_USUAL_TIME + WORKER)
    early = "1 of 3 ranks did not arrive within 1 s: 2; rank 0 waits for 2 s more"
    assert early in first and "1 of 3 ranks did not arrive within 3 s: 2" in first
    assert early not in other and "1 of 3 ranks did not arrive within 3 s: 2" in other


def test_rank_0_waits_until_the_others_have_read_the_result():
    """Its store ends with it. A rank that reads the result too late would report an unreachable address instead."""
    for output in start([0, 1], 3, timeout_s=5.0, worker=LATE_READER + WORKER):
        assert "1 of 3 ranks did not arrive within 5 s: 2" in output


def test_missing_rank_0_is_reported_with_its_address():
    (output,) = start([1], 2, timeout_s=1.0)
    assert "rank 1 did not reach rank 0 at 127.0.0.1:" in output and "firewall" in output
    assert float(output.split()[-1]) < 30


def test_interface_that_does_not_exist_is_reported_until_another_is_set():
    """The interface lo exists on every machine; that of the nodes does not."""
    (output,) = start([0], 1, GLOO_SOCKET_IFNAME="none0")
    assert "rank 0 cannot open gloo connections" in output
    assert (
        "remedy: set interconnect.socket_interface in the site file" in output
        and "(GLOO_SOCKET_IFNAME is none0)" in output
    )
    (output,) = start([0], 1, GLOO_SOCKET_IFNAME="lo")  # as the launch script sets it
    assert output.startswith("sum 1")


def test_port_in_use_is_reported_until_it_is_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(
            UserError, match=r"cannot serve the rendezvous .*\s+remedy: .* MASTER_PORT free; start through"
        ):
            rendezvous.meet(Rank(0, 1, 0, 1, "n1"), 2.0)
    monkeypatch.setenv("MASTER_PORT", free_port())
    assert rendezvous.meet(Rank(0, 1, 0, 1, "n1"), 2.0)


def test_name_of_rank_0_without_an_address_is_reported_at_once(monkeypatch: pytest.MonkeyPatch):
    """torch would ask for it until the rendezvous times out, and then name a firewall."""
    monkeypatch.setattr(rendezvous, "_NAME_SERVICE_S", 0.0)
    monkeypatch.setattr(rendezvous, "_NAME_RETRY_INTERVAL_S", 0.0)
    monkeypatch.setattr(rendezvous, "export_rank", lambda rank: None)
    monkeypatch.setenv("MASTER_ADDR", "n7.invalid")
    wanted = (
        "n8: rank 1 cannot resolve n7.invalid, the name of rank 0's node: .*\n  remedy: set interconnect.master_address"
    )
    with pytest.raises(UserError, match=wanted), process_group(Rank(1, 2, 0, 2, "n8"), "gloo", 30.0):
        pass


def test_a_slow_name_service_is_named_until_it_is_quick(monkeypatch: pytest.MonkeyPatch):
    """torch's store asks for the name of each rank. With many ranks and a slow name service, the rendezvous never ends."""
    asked: list[Any] = []
    lookup_s = iter([0.3, 0.0])

    def look_up(address: Any, flags: int) -> None:
        asked.append(address[0])
        threading.Event().wait(next(lookup_s))

    monkeypatch.setattr(rendezvous.socket, "getnameinfo", look_up)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    missing = "1 of 2 ranks did not arrive within 0.5 s: 1"
    for wanted in (
        rf"{missing}; the name service took [\d.]+ s .*\s+remedy: .* reverse zone",
        rf"{missing}\s+remedy: read in",
    ):
        monkeypatch.setenv("MASTER_PORT", free_port())
        with pytest.raises(UserError, match=wanted):
            rendezvous.meet(Rank(0, 2, 0, 1, "n1"), 0.5)
    assert asked == ["::ffff:127.0.0.1"] * 2, "as torch asks for it"


def test_name_service_that_never_answers_is_named(monkeypatch: pytest.MonkeyPatch):
    stopped = threading.Event()
    monkeypatch.setattr(rendezvous, "_NAME_SERVICE_S", 0.0)
    monkeypatch.setattr(rendezvous, "_NAME_ANSWER_S", 0.2)
    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", lambda *arguments: stopped.wait(600))
    try:
        with pytest.raises(UserError, match=r"cannot resolve n7, the name of rank 0's node: no answer within 0\.2 s"):
            rendezvous._require_known_name(Rank(1, 2, 0, 2, "n8"), "n7")
    finally:
        stopped.set()


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
def test_node_list_is_expanded(nodelist: str, names: list[str]):
    assert parse_node_list(nodelist) == names


@pytest.mark.parametrize(
    ("backend", "fails", "is_destroyed"),
    [("nccl", False, True), ("nccl", True, False), ("gloo", False, True), ("gloo", True, True)],
)
def test_group_of_nccl_is_left_to_torch_after_an_error(
    monkeypatch: pytest.MonkeyPatch, backend: str, fails: bool, is_destroyed: bool
):
    """NCCL waits for messages that never come, so the error would not be reported."""
    calls: list[str] = []
    for name in ("export_rank", "_tell_nccl_about_adapters", "meet"):
        monkeypatch.setattr(rendezvous, name, lambda *arguments: None)
    monkeypatch.setattr(rendezvous, "gpu_index", lambda rank: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, **options: calls.append("init"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroy"))
    with (
        pytest.raises(ValueError, match="broken") if fails else nullcontext(),
        process_group(Rank(0, 1, 0, 1, "n1"), backend, 30.0),
    ):
        if fails:
            raise ValueError("broken")
    assert calls == ["init", *(["destroy"] if is_destroyed else [])]


class CountedStore:
    """A store in which ranks register one after another, one with each request."""

    def __init__(self) -> None:
        self.registered, self.requests = set[str](), 0

    def check(self, keys: list[str]) -> bool:
        self.requests += 1
        self.registered.add(rendezvous.host_key(self.requests))
        return self.registered.issuperset(keys)


def test_rank_0_asks_for_all_ranks_in_one_request(monkeypatch: pytest.MonkeyPatch):
    """With one request per rank, 4,096 ranks would keep rank 0's store busy while they register."""
    monkeypatch.setattr(rendezvous, "_POLL_INTERVAL_S", 0.0)
    store: Any = CountedStore()
    assert rendezvous.wait_for_keys(store, rendezvous.host_key, range(1, 51), 60.0) == []
    assert store.requests == 50
    assert rendezvous.wait_for_keys(store, rendezvous.host_key, [3, 90], -1.0) == [90]
