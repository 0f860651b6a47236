"""Decides which node cannot be reached, or cannot reach others, and whose name leads other nodes to another address."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longhaul.artifacts.node_check_row import CheckRow
from longhaul.checks.build_check_rows import Component
from longhaul.checks.node_connections import CONNECT_S, Connections, ListeningNode, is_loopback

_FROM, _TO, _NAME = "connections from other nodes", "connections to other nodes", "name on other nodes"
_OPEN = (
    "let the admins open all TCP ports between compute nodes, or set interconnect.socket_interface in the site file to an "
    "interface that connects them"
)
_HOSTS = (
    "set interconnect.socket_interface in the site file to an interface that connects the nodes, or let the admins correct "
    "the node's name in its /etc/hosts"
)
_NAMES = "let the admins correct the node's name in the name service, or in /etc/hosts of the other nodes"
_NAMED, _NAMED_PAIRS = 4, 8
"""Largest numbers of other nodes that a value names, and of pairs that a message names."""


def nodes_without_connections(found: Sequence[Connections]) -> list[str]:
    """Return the names of the nodes without which all others reach each other; [] if the fault may be elsewhere.

    One failed connection says nothing about either node: a route between two groups of nodes may be missing. A bad node reaches
    nobody, or is reached by none of several nodes. A fault of half of the nodes is one of the site.

    found: of all nodes of the job, by rank
    """
    cut_off = _cut_off(found)
    bad = cut_off | {rank for rank in range(len(found)) if _is_reached_by_nobody(rank, found, cut_off)}
    is_explained = all(rank in bad or peer in bad for rank, peer in _failed(found))
    return [found[rank].endpoint.node for rank in sorted(bad)] if is_explained and 2 * len(bad) < len(found) else []


def failed_pairs(found: Sequence[Connections]) -> str:
    """Return the connections that failed, as `n1 to n2, n1 to n3`."""
    pairs = [f"{found[rank].endpoint.node} to {found[peer].endpoint.node}" for rank, peer in _failed(found)]
    return _names(pairs, _NAMED_PAIRS)


def connection_rows(found: Sequence[Connections]) -> list[CheckRow]:
    """Return the rows of all nodes. found: of all nodes of the job, by rank."""
    cut_off = _cut_off(found)
    return [row for rank in range(len(found)) for row in _rows_of_node(rank, found, cut_off)]


def _failed(found: Sequence[Connections]) -> list[tuple[int, int]]:
    return [(rank, peer) for rank, node in enumerate(found) for peer, reason in node.reached.items() if reason]


def _cut_off(found: Sequence[Connections]) -> set[int]:
    return {rank for rank in range(len(found)) if _reaches_nobody(rank, found)}


def _is_reached_by_nobody(rank: int, found: Sequence[Connections], cut_off: set[int]) -> bool:
    answers = _asked(rank, found, cut_off).values()
    return len(answers) > 1 and all(node.reached[rank] for node in answers)


def _asked(rank: int, found: Sequence[Connections], cut_off: set[int]) -> dict[int, Connections]:
    """Return the nodes that tried to connect to this one. Nodes that reach nobody say nothing about it."""
    return {other: node for other, node in enumerate(found) if rank in node.reached and other not in cut_off}


def _reaches_nobody(rank: int, found: Sequence[Connections]) -> bool:
    """Return whether a node reaches no other one, although others reach one of those: then it is the node itself."""
    reached = found[rank].reached
    return all(reached.values()) and any(
        node.reached.get(peer) == "" for other, node in enumerate(found) for peer in reached if other != rank
    )


def _rows_of_node(rank: int, found: Sequence[Connections], cut_off: set[int]) -> Iterator[CheckRow]:
    """Yield the rows of one node. cut_off: ranks of nodes that reach nobody, which say nothing about the others."""
    endpoint, component = found[rank].endpoint, Component(found[rank].endpoint.node)
    asked = _asked(rank, found, cut_off)
    failed = {node.endpoint.node: node.reached[rank] for node in asked.values() if node.reached[rank]}
    value, expected = f"from {_names([node.endpoint.node for node in asked.values()])}", f"within {CONNECT_S:g} s"
    if failed:
        value = f"not from {_names(list(failed))}: {next(iter(failed.values()))}{_loopback_text(endpoint)}"
    remedy = _HOSTS if _loopback_text(endpoint) else _OPEN
    if asked:
        yield component.row(_FROM, value, expected, "fail" if failed else "ok", remedy)
    if rank in cut_off:
        peers = {found[peer].endpoint.node: reason for peer, reason in found[rank].reached.items()}
        yield component.row(_TO, f"not to {_names(list(peers))}: {next(iter(peers.values()))}", expected, "fail", _OPEN)
    yield _name_row(component, rank, found)


def _loopback_text(endpoint: ListeningNode) -> str:
    is_own = endpoint.address and not endpoint.interface and is_loopback(endpoint.address)
    return f" ({endpoint.host} itself resolves its name to it)" if is_own else ""


def _name_row(component: Component, rank: int, found: Sequence[Connections]) -> CheckRow:
    host = found[rank].endpoint.host
    problems = {node.endpoint.node: node.names[rank] for node in found if node.names.get(rank)}
    if not problems:
        return component.row(_NAME, host, "an address of the node")
    value = f"{host}: {_names(list(problems))} {next(iter(problems.values()))}"
    return component.row(_NAME, value, "an address of the node", "warn", _NAMES)


def _names(names: Sequence[str], named: int = _NAMED) -> str:
    more = len(names) - named
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:named])} and {more} others"
