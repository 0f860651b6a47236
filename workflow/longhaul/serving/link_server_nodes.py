"""Links the nodes of one server: their addresses, and the end of the other nodes' parts with the first node's process.

Each node of a job has one process of longhaul. The one on the first node listens at a port, and the others connect to it.
Nothing is sent. When the first node's process ends, also by kill -9, Linux closes the connections, and the other processes
stop their part of the engine. Engines alone do so only sometimes, and after minutes.
"""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from longhaul.errors import UserError
from longhaul.runtime.process_rank import Rank, require_planned_size, this_rank

_CONNECT_TIMEOUT_S, _RETRY_S = 180.0, 1.0
"""Nodes of one srun start within seconds. Imports from a cold shared file system take up to minutes."""
_INTERFACE = "name a network interface of the cluster in the site file: interconnect.master_address.interface"


class NodeLinkError(UserError):
    """The first node's process cannot be reached. On other nodes, or a minute later, it may be."""

    failure_class = "node"


@dataclass(frozen=True)
class NodeLink:
    """The place of this node among the nodes of one server.

    rank:          number of the node; the first one is 0
    first_address: IPv4 address of the first node
    own_address:   IPv4 address of this node in the network of the first one
    engine_port:   port of the first node at which the engine's processes meet
    connection:    first node: the listening socket; other nodes: the connection to it
    """

    rank: int
    first_address: str
    own_address: str
    engine_port: int
    connection: socket.socket

    @property
    def leader(self) -> tuple[str, int]:
        """Address and port at which the engine's processes meet."""
        return self.first_address, self.engine_port


@contextmanager
def node_link(nodes: int) -> Iterator[NodeLink | None]:
    """Link the processes of a job, one on each of its `nodes`, during a `with` block. None: the job has one node.

    Raises:
        UserError: the job has another number of processes or nodes, or the first node has no address, or a public one.
        NodeLinkError: the first node's process cannot be reached, or its port is in use.
    """
    rank = this_rank()
    require_planned_size(rank, nodes, nodes)
    if nodes == 1:
        yield None
        return
    with _link(rank) as link:
        yield link


@contextmanager
def _link(rank: Rank) -> Iterator[NodeLink]:
    address = listening_address(rank.nodes) if rank.is_main else first_node_address(rank.nodes)
    engine_port = int(os.environ["MASTER_PORT"])
    # The next port is that of the job's next step, which starts after this one.
    with _listen(address, engine_port + 1, rank.nodes) if rank.is_main else _connect(address, engine_port + 1) as link:
        yield NodeLink(rank.rank, address, link.getsockname()[0], engine_port, link)


def first_node_address(nodes: int) -> str:
    """Return the IPv4 address of a job's first node.

    A loopback address is right for one node: it may be the whole cluster, or the site file names the interface `lo`.

    Raises:
        UserError: it has none, it is public, or the other nodes cannot reach it.
    """
    name = os.environ["MASTER_ADDR"]
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise UserError(f"the first node's name {name} has no address: {error}", _INTERFACE) from None
    if ipaddress.ip_address(address).is_global:
        raise UserError(
            f"{address}, the address of the first node {name}, is public: a server must not listen there", _INTERFACE
        )
    if nodes > 1 and ipaddress.ip_address(address).is_loopback:
        raise UserError(f"the first node's name {name} is {address}: the other nodes cannot reach it there", _INTERFACE)
    return address


def listening_address(nodes: int) -> str:
    """Return the IPv4 address of a job's first node, which is this one.

    Raises:
        UserError: as first_node_address, or this node does not have the address, as with an outdated entry of a name service.
    """
    address = first_node_address(nodes)
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise UserError(
                f"{address}, the address of the first node {os.environ['MASTER_ADDR']}, is not an address of "
                f"{socket.gethostname()}: {error.strerror}",
                _INTERFACE,
            ) from None
    return address


def _listen(address: str, port: int, nodes: int) -> socket.socket:
    """Return a socket to which the other nodes connect. Linux keeps the connections until it is closed; nothing accepts them."""
    try:
        return socket.create_server((address, port), backlog=nodes)
    except OSError as error:
        raise NodeLinkError(
            f"port {port} of {address} cannot be used: {error.strerror}",
            "run again: another attempt takes another port",
        ) from None


def _connect(address: str, port: int, timeout_s: float = _CONNECT_TIMEOUT_S) -> socket.socket:
    end = time.monotonic() + timeout_s
    while True:
        try:
            return socket.create_connection((address, port), timeout=timeout_s)
        except OSError as error:
            if time.monotonic() >= end:
                raise NodeLinkError(
                    f"{socket.gethostname()} did not reach the first node at {address}:{port} within {timeout_s:g} s: {error}",
                    "check that the first node is up, and that no firewall blocks ports between compute nodes",
                ) from None
            time.sleep(_RETRY_S)


def first_node_ended(link: NodeLink, timeout_s: float) -> bool:
    """Return whether the first node's process ends within this time. The connection gets readable then, as nothing is sent."""
    return bool(select.select([link.connection], [], [], timeout_s)[0])
