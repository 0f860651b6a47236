"""Decides which node cannot be reached, or cannot reach others, and whose name leads other nodes to another address."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence

from longhaul.artifacts.node_check_row import CheckRow
from longhaul.checks.build_check_rows import Component
from longhaul.checks.node_connections import CONNECT_S, Connections, ListeningNode

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
_NAMED = 4
"""Largest number of other nodes that a value names."""


def connection_rows(found: Sequence[Connections]) -> list[CheckRow]:
    """Return the rows of all nodes. found: of all nodes of the job, by rank."""
    cut_off = {rank for rank, node in enumerate(found) if _reaches_nobody(rank, found)}
    return [row for rank in range(len(found)) for row in _rows_of_node(rank, found, cut_off)]


def _reaches_nobody(rank: int, found: Sequence[Connections]) -> bool:
    """Return whether a node reaches no other one, although others reach one of those: then it is the node itself."""
    reached = found[rank].reached
    return all(reached.values()) and any(
        node.reached.get(peer) == "" for other, node in enumerate(found) for peer in reached if other != rank
    )


def _rows_of_node(rank: int, found: Sequence[Connections], cut_off: set[int]) -> Iterator[CheckRow]:
    """Yield the rows of one node. cut_off: ranks of nodes that reach nobody, which say nothing about the others."""
    endpoint, component = found[rank].endpoint, Component(found[rank].endpoint.node)
    asked = {other: node for other, node in enumerate(found) if rank in node.reached and other not in cut_off}
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
    is_own = endpoint.address and not endpoint.interface and ipaddress.ip_address(endpoint.address).is_loopback
    return f" ({endpoint.host} itself resolves its name to it)" if is_own else ""


def _name_row(component: Component, rank: int, found: Sequence[Connections]) -> CheckRow:
    host = found[rank].endpoint.host
    problems = {node.endpoint.node: node.names[rank] for node in found if node.names.get(rank)}
    if not problems:
        return component.row(_NAME, host, "an address of the node")
    value = f"{host}: {_names(list(problems))} {next(iter(problems.values()))}"
    return component.row(_NAME, value, "an address of the node", "warn", _NAMES)


def _names(nodes: Sequence[str]) -> str:
    more = len(nodes) - _NAMED
    return ", ".join(nodes) if more <= 1 else f"{', '.join(nodes[:_NAMED])} and {more} others"
