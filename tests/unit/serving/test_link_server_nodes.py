"""The nodes of one server: their addresses, and that the other nodes' parts end with the first node's process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longhaul.errors import UserError
from longhaul.runtime.process_rank import Rank
from longhaul.serving import link_server_nodes as module
from longhaul.serving.link_server_nodes import (
    NodeLink,
    NodeLinkError,
    _link,
    first_node_address,
    first_node_ended,
    node_link,
)
from longhaul.serving.server_process import free_port
from tests.support.wait import wait_for

FIRST_NODE = """
import sys, time
from pathlib import Path
from longhaul.serving.link_server_nodes import _listen
link = _listen("127.0.0.1", int(sys.argv[1]), 2)
Path(sys.argv[2]).touch()
time.sleep(600)
"""


@pytest.fixture
def first_node(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The process of the first node, and the port at which it listens."""
    port, listens = free_port("127.0.0.1"), tmp_path / "listens"
    process = subprocess.Popen([sys.executable, "-c", FIRST_NODE, str(port), str(listens)])
    wait_for(listens.exists)
    yield process, port
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_others_see_the_end_of_the_first_nodes_process(
    first_node: tuple[subprocess.Popen[bytes], int], number: int
):
    process, port = first_node
    others = [NodeLink(rank, "127.0.0.1", "", port, module._connect("127.0.0.1", port)) for rank in (1, 2)]
    assert not any(first_node_ended(link, 0.1) for link in others)
    process.send_signal(number)
    assert all(first_node_ended(link, 10) for link in others)
    for link in others:
        link.connection.close()


def test_a_node_waits_for_the_first_one_to_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_RETRY_S", 0.05)
    port = free_port("127.0.0.1")
    with pytest.raises(NodeLinkError, match=rf"did not reach the first node at 127\.0\.0\.1:{port} within 0\.3 s"):
        module._connect("127.0.0.1", port, timeout_s=0.3)
    with socket.create_server(("127.0.0.1", port)), module._connect("127.0.0.1", port, timeout_s=10):
        pass  # the first node is up


def test_a_port_that_is_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(NodeLinkError, match=rf"port {port} of 127\.0\.0\.1 cannot be used: Address already in use"):
            module._listen("127.0.0.1", port, 2)
        module._listen("127.0.0.1", free_port("127.0.0.1"), 2).close()  # another attempt


def test_one_node_has_no_link():
    with node_link(1) as link:
        assert link is None


def test_fewer_processes_than_planned_are_refused():
    with pytest.raises(UserError, match="runs 1 ranks on 1 nodes; the plan says 2 ranks on 2 nodes"), node_link(2):
        pass


def test_two_nodes_have_the_ports_of_the_step(monkeypatch: pytest.MonkeyPatch):
    port = free_port("127.0.0.1")
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", str(port - 1))
    monkeypatch.setattr(module, "first_node_address", lambda nodes: "127.0.0.1")
    with _link(Rank(0, 2, 0, 2, "n1")) as first, _link(Rank(1, 2, 0, 2, "n2")) as second:
        assert first.leader == second.leader == ("127.0.0.1", port - 1)
        assert (first.rank, second.rank) == (0, 1)
        assert second.own_address == "127.0.0.1"
        start = time.monotonic()
        first.connection.close()
        assert first_node_ended(second, 10) and time.monotonic() - start < 5


@pytest.mark.parametrize(("nodes", "address"), [(1, "127.0.1.1"), (2, "10.1.2.3")])
def test_the_address_of_the_first_node(monkeypatch: pytest.MonkeyPatch, nodes: int, address: str):
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: {"n1": address}[name])
    assert first_node_address(nodes) == address


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.1.1", r"n1 is 127\.0\.1\.1: the other nodes cannot reach it"),
        ("8.8.8.8", r"8\.8\.8\.8, the address of the first node n1, is public"),
        ("", "the first node's name n1 has no address"),
    ],
)
def test_nodes_meet_at_no_other_address_until_an_interface_is_named(
    monkeypatch: pytest.MonkeyPatch, address: str, message: str
):
    addresses = {"n1": address, "n1-ib": "10.1.2.3"}

    def resolve(name: str) -> str:
        if not addresses[name]:
            raise socket.gaierror("Name or service not known")
        return addresses[name]

    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setattr(socket, "gethostbyname", resolve)
    with pytest.raises(UserError, match=message) as refused:
        first_node_address(2)
    assert "interconnect.master_address.interface" in refused.value.hint
    monkeypatch.setenv("MASTER_ADDR", "n1-ib")  # the address of the interface
    assert first_node_address(2) == "10.1.2.3"
