"""Nodes connect to each other over real sockets of this machine; the node that is not reached is named."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from longhaul.artifacts.node_check_row import CheckRow
from longhaul.checks import environment, node_connections
from longhaul.checks.build_check_rows import problem_lines, warning_lines
from longhaul.checks.connection_checks import connection_rows, nodes_without_connections
from longhaul.checks.node_connections import RETRY_PAUSES_S, Connections, ListeningNode, connect_to_others, peers_of
from longhaul.errors import BadNodesError, UserError
from longhaul.runtime.process_rank import Rank
from tests.support.healthy_node_facts import environment_job


@pytest.fixture(autouse=True)
def without_slurm_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_connections, "RETRY_PAUSES_S", (0.0, 0.0))
    for name in ("SLURMD_NODENAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def rank(number: int, nodes: int) -> Rank:
    """Return the rank of a node whose name is its own address of this machine's loopback."""
    return Rank(number, nodes, 0, nodes, f"127.0.0.{number + 1}")


def connected(nodes: int) -> tuple[bool, list[CheckRow]]:
    """Let nodes test their connections at once, and return what the first one has."""
    store = HashStore()
    with ThreadPoolExecutor(nodes) as threads:
        results = list(threads.map(lambda number: connect_to_others(store, rank(number, nodes)), range(nodes)))  # type: ignore[arg-type]
    assert len({is_good for is_good, _ in results}) == 1 and not any(found for _, found in results[1:])
    return results[0][0], connection_rows(results[0][1])


def test_each_node_connects_to_its_neighbours_and_to_the_first_one():
    assert [peers_of(rank(number, 6)) for number in (0, 1, 3)] == [[1, 5], [0, 2], [0, 2, 4]]
    assert [peers_of(rank(number, 2)) for number in range(2)] == [[1], [0]]
    is_good, rows = connected(7)
    assert is_good and {row["result"] for row in rows} == {"ok"} and len(rows) == 14
    assert rows[0]["value"] == "from 127.0.0.2, 127.0.0.3, 127.0.0.4, 127.0.0.5 and 2 others"


Wrap = Callable[[ListeningNode], ListeningNode]


def change_endpoint(monkeypatch: pytest.MonkeyPatch, host: str, change: Wrap) -> None:
    """Let a node publish another endpoint."""
    listening = node_connections._listening

    @contextmanager
    def changed(of: Rank) -> Iterator[ListeningNode]:
        with listening(of) as endpoint:
            yield change(endpoint) if of.host == host else endpoint

    monkeypatch.setattr(node_connections, "_listening", changed)


def test_node_behind_a_firewall_is_named(monkeypatch: pytest.MonkeyPatch):
    """Its queue of connections is full, so the kernel drops the request, as a firewall does."""
    monkeypatch.setattr(node_connections, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.3", 0), backlog=0) as full:
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        change_endpoint(monkeypatch, "127.0.0.3", lambda endpoint: replace(endpoint, port=full.getsockname()[1]))
        is_good, rows = connected(4)
        for one in waiting:
            one.close()
    (line,) = problem_lines(rows)
    assert not is_good and line.startswith(
        "127.0.0.3: connections from other nodes: not from 127.0.0.2, 127.0.0.4: 127.0.0.3 does not answer"
    )


@pytest.mark.parametrize(("failures", "attempts", "problem"), [(0, 1, ""), (2, 3, ""), (3, 3, "attempt 3 failed")])
def test_failed_connection_is_tried_again(monkeypatch: pytest.MonkeyPatch, failures: int, attempts: int, problem: str):
    """A busy host may miss the first attempt. The reason is that of the last one."""
    made = 0

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        nonlocal made
        made += 1
        if made <= failures:
            raise OSError(None, f"attempt {made} failed")
        return create_connection(address, timeout)

    create_connection = socket.create_connection
    with node_connections._listening(rank(0, 2)) as endpoint:
        monkeypatch.setattr(socket, "create_connection", connect)
        found = node_connections._connection_problem(endpoint)
    assert (made, found) == (attempts, problem and f"127.0.0.1: {problem}")


def test_results_are_waited_for_as_long_as_all_attempts_last():
    attempts = 1 + len(RETRY_PAUSES_S)
    longest_s = sum(RETRY_PAUSES_S) + attempts * (node_connections.CONNECT_S + node_connections.CONNECT_S)
    assert longest_s + 10 <= node_connections._RESULTS_S


def test_node_that_takes_its_name_for_the_loopback_is_named(monkeypatch: pytest.MonkeyPatch):
    """Another program answers there on the other nodes."""
    with socket.create_server(("127.0.1.1", 0)) as other:
        change_endpoint(
            monkeypatch,
            "127.0.0.2",
            lambda found: replace(found, address="127.0.1.1", port=other.getsockname()[1], host="n2"),
        )
        other.settimeout(60)
        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: [other.accept()[0].close() for _ in range(3)])
            is_good, rows = connected(2)
    (line,) = problem_lines(rows)
    assert not is_good and line == (
        "127.0.0.2: connections from other nodes: not from 127.0.0.1: another program answers at 127.0.1.1 (n2 itself "
        "resolves its name to it), expected within 5 s; set interconnect.socket_interface in the site file to an interface "
        "that connects the nodes, or let the admins correct the node's name in its /etc/hosts"
    )


def test_node_without_the_interface_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    is_good, rows = connected(2)
    assert not is_good and "it has no address on ib7" in problem_lines(rows)[0]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert connected(2)[0]


def node(number: int, reached: dict[int, str], names: dict[int, str] | None = None) -> Connections:
    endpoint = ListeningNode(
        f"n{number}", f"n{number}.cluster", f"10.0.0.{number}", 1, "word", "", [f"10.0.0.{number}"]
    )
    return Connections(endpoint, reached, names or {})


def test_node_that_reaches_nobody_is_bad_and_not_the_others():
    silent = "10.0.0.1 does not answer"
    found = [
        node(0, {1: "", 3: ""}),
        node(1, {0: "", 2: ""}),
        node(2, {0: silent, 1: silent, 3: silent}),
        node(3, {0: "", 2: ""}),
    ]
    (line,) = problem_lines(connection_rows(found))
    assert line.startswith(
        "n2: connections to other nodes: not to n0, n1, n3: 10.0.0.1 does not answer, expected within 5 s; let"
    )


def test_two_nodes_without_a_link_are_both_named():
    lines = problem_lines(connection_rows([node(0, {1: "refused"}), node(1, {0: "refused"})]))
    assert lines == [
        "n0 (not from n1: refused), n1 (not from n0: refused): connections from other nodes, expected within 5 s; let the admins "
        "open all TCP ports between compute nodes, or set interconnect.socket_interface in the site file to an interface that "
        "connects them"
    ]


def test_name_that_leads_to_another_address_is_a_warning():
    assert node_connections._name_problem(replace(node(1, {}).endpoint, host="127.9.9.9")) == "resolves it to 127.9.9.9"
    unknown = node_connections._name_problem(replace(node(1, {}).endpoint, host="no.such.host.invalid"))
    assert unknown.startswith("does not resolve it (")
    rows = connection_rows([node(0, {1: ""}, {1: "resolves it to 10.9.9.9"}), node(1, {0: ""}, {0: ""})])
    assert warning_lines(rows)[0].startswith(
        "n1: name on other nodes: n1.cluster: n0 resolves it to 10.9.9.9, expected an address"
    )


def job_with_failures(nodes: int, *failed: tuple[int, int]) -> list[Connections]:
    """Return what the nodes of a job find if these connections, from rank to rank, fail and all others work."""
    return [
        node(number, {peer: "no route" if (number, peer) in failed else "" for peer in peers_of(rank(number, nodes))})
        for number in range(nodes)
    ]


ISLANDS = ((3, 4), (4, 3), (0, 7), (7, 0), (4, 0), (5, 0), (6, 0))
"""Eight nodes in two groups without a route between them."""
BAD_NODES: dict[str, tuple[int, tuple[tuple[int, int], ...], list[str]]] = {
    "two groups without a route": (8, ISLANDS, []),
    "one way between two groups": (8, ((3, 4), (0, 7)), []),
    "bad routes to two nodes": (8, ((5, 0), (5, 4)), []),
    "two nodes, one way": (2, ((0, 1),), []),
    "two nodes, both ways": (2, ((0, 1), (1, 0)), []),
    "no connection at all": (4, tuple((one, other) for one in range(4) for other in range(4)), []),
    "only the first node is open": (8, tuple((one, other) for one in range(8) for other in range(1, 8)), []),
    "closed ports": (8, ((2, 3), (4, 3)), ["n3"]),
    "closed ports of the first node": (8, tuple((one, 0) for one in range(1, 8)), ["n0"]),
    "reaches nobody": (8, ((3, 0), (3, 2), (3, 4)), ["n3"]),
    "dead neighbours": (8, ((3, 0), (3, 2), (3, 4), (2, 3), (4, 3), (5, 4), (4, 0), (4, 5)), ["n3", "n4"]),
    "closed ports, and a route elsewhere": (8, ((2, 3), (4, 3), (6, 7)), []),
}


@pytest.mark.parametrize(("nodes", "failed", "bad"), BAD_NODES.values(), ids=BAD_NODES)
def test_node_is_bad_only_if_it_explains_all_failures(nodes: int, failed: tuple[tuple[int, int], ...], bad: list[str]):
    found = job_with_failures(nodes, *failed)
    assert nodes_without_connections(found) == bad
    assert any(row["result"] == "fail" for row in connection_rows(found)), "the failures stay"


def test_message_names_the_pairs_and_nobody_is_quarantined(tmp_path: Path):
    paths = {name: str(tmp_path / name) for name in ("folder", "out")} | {"job_folder": str(tmp_path)}
    with pytest.raises(UserError) as raised:
        environment._refuse_connections(job_with_failures(8, *ISLANDS), environment_job(**paths))
    assert not isinstance(raised.value, BadNodesError)
    assert raised.value.message.startswith(
        "nodes do not reach each other (n0 to n7, n3 to n4, n4 to n0, n4 to n3, n5 to n0, n6 to n0, n7 to n0), and no node is "
        "excluded, as the fault may be in the network between them; nothing else was compared:\n"
    )
    with pytest.raises(BadNodesError) as raised:
        environment._refuse_connections(job_with_failures(8, (2, 3), (4, 3)), environment_job(**paths))
    assert list(raised.value.nodes) == ["n3"] and raised.value.nodes["n3"].startswith("connections")
    assert raised.value.message.startswith(
        "nodes do not reach each other; nothing else was compared:\n  - n3: connections"
    )


def test_name_that_leads_to_the_loopback_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    """Each node has 127.0.0.1 and ::1, so they say nothing about which node a name leads to."""
    inet = [SimpleNamespace(family=socket.AF_INET, address=address) for address in ("127.0.0.1", "10.0.0.1")]
    inet6 = [SimpleNamespace(family=socket.AF_INET6, address="::1")]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"all": [*inet, *inet6]})
    with node_connections._listening(rank(1, 2)) as endpoint:
        assert endpoint.interfaces == ["10.0.0.1", "127.0.0.2"], (
            "the loopback's address where this node listens is its own"
        )
        assert node_connections._name_problem(endpoint) == ""
        localhost = node_connections._name_problem(replace(endpoint, host="127.0.0.1"))
    assert localhost == "resolves it to 127.0.0.1"


def test_node_listens_on_its_next_address_where_ipv6_is_off(monkeypatch: pytest.MonkeyPatch):
    class WithoutIpv6(socket.socket):
        def __init__(self, family: int = -1, *others: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(97, "Address family not supported by protocol")
            super().__init__(family, *others)

    monkeypatch.setattr(socket, "socket", WithoutIpv6)
    listener = node_connections._listener(["::1", "127.0.0.1"])
    assert listener and listener.getsockname()[0] == "127.0.0.1"
    listener.close()


def test_own_name_that_nobody_answers_for_costs_its_time_alone(monkeypatch: pytest.MonkeyPatch):
    """Like gloo, the node then listens on the loopback, and its neighbours name it."""
    stopped = threading.Event()
    monkeypatch.setattr(node_connections, "CONNECT_S", 0.2)
    monkeypatch.setattr(node_connections, "_addresses", lambda name: stopped.wait(600))
    try:
        assert node_connections._own_addresses("n1") == ["127.0.0.1"]
    finally:
        stopped.set()
