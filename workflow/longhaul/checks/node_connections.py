"""Tests whether nodes reach each other, before gloo waits for a connection that never comes: 15 minutes, without a name.

gloo and NCCL's bootstrap listen on ports that the kernel chooses. gloo listens on the address of GLOO_SOCKET_IFNAME, else on
that of the host's own name. So each node listens there, and connects to the nodes beside it and to the first one. Results
go through rank 0's store, which the nodes have reached already.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any

import psutil
from pydantic import TypeAdapter

from longhaul.errors import first_line
from longhaul.runtime.call_with_deadline import call_within
from longhaul.runtime.process_rank import Rank
from longhaul.runtime.rendezvous import RendezvousError, wait_for_keys

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

CONNECT_S = 5.0
"""Linux repeats a lost request for a connection after 1 s and 3 s."""
RETRY_PAUSES_S = (1.0, 5.0)
"""A connection that fails is tried again after each pause: a host or switch that is busy for a moment must not cost a node."""
_WORST_CASE_S = 2 * CONNECT_S * (1 + len(RETRY_PAUSES_S)) + sum(RETRY_PAUSES_S)
"""Each attempt waits for the connection, and then for the word."""
_START_S, _RECEIVED_S = 30.0, 10.0
_RESULTS_S = _WORST_CASE_S + _START_S
"""_START_S: nodes do not begin at the same moment, and a name service may be slow."""
_BACKLOG = 4096
_RESULT_KEY, _GOOD, _BAD = "longhaul/connections/result", "good", "bad"


@dataclass(frozen=True)
class ListeningNode:
    """Where a node listens.

    word:       what it sends to each connection, so that another program is noticed
    interface:  of GLOO_SOCKET_IFNAME; "": the address is that of the host's own name
    interfaces: all addresses of the node; of the loopback, which each node has, only the one where it listens
    error:      why it cannot listen
    """

    node: str
    host: str
    address: str
    port: int
    word: str
    interface: str
    interfaces: list[str]
    error: str = ""


@dataclass(frozen=True)
class Connections:
    """Result of one node. Both dicts have ranks of other nodes as keys.

    reached: why the other node cannot be reached; "" if it can
    names:   what is wrong with the other node's host name
    """

    endpoint: ListeningNode
    reached: dict[int, str]
    names: dict[int, str]


_ENDPOINT, _CONNECTIONS = TypeAdapter(ListeningNode), TypeAdapter(Connections)


def connect_to_others(store: TCPStore, rank: Rank) -> tuple[bool, list[Connections]]:
    """Test this node's connections to others. Return whether all nodes reach each other; on the first node also what they found.

    Raises:
        RendezvousError: a node ended meanwhile.
    """
    from torch.distributed import DistError

    try:
        return _connect_to_others(store, rank)
    except DistError as error:
        text = f"{rank.host}: another node ended while the nodes tested their connections: {first_line(error)}"
        raise RendezvousError(text, "read in the job's log why it ended") from None


def _connect_to_others(store: TCPStore, rank: Rank) -> tuple[bool, list[Connections]]:
    with _listening(rank) as endpoint:
        store.set(_endpoint_key(rank.rank), json.dumps(asdict(endpoint)))
        store.set(_result_key(rank.rank), json.dumps(asdict(_own_connections(store, rank, endpoint))))
        if not rank.is_main:
            is_good = store.get(_RESULT_KEY).decode() == _GOOD  # until then, others may still try this node
            store.set(_received_key(rank.rank), "")
            return is_good, []
        everyone = range(rank.world_size)
        if missing := wait_for_keys(store, _result_key, everyone, _RESULTS_S):
            raise RendezvousError(
                f"ranks {', '.join(map(str, missing))} did not report their connections within {_RESULTS_S:g} s",
                "read in the job's log why they ended",
            )
        found = [_CONNECTIONS.validate_json(store.get(_result_key(other))) for other in everyone]
        is_good = not any(reason for node in found for reason in node.reached.values())
        store.set(_RESULT_KEY, _GOOD if is_good else _BAD)
        wait_for_keys(store, _received_key, everyone[1:], _RECEIVED_S)  # the store ends with this process
        return is_good, found


def peers_of(rank: Rank) -> list[int]:
    """Return the ranks that a node connects to: three at most, however many nodes there are."""
    beside = {(rank.rank - 1) % rank.world_size, (rank.rank + 1) % rank.world_size}
    return sorted((beside | {0}) - {rank.rank})


def _own_connections(store: TCPStore, rank: Rank, endpoint: ListeningNode) -> Connections:
    peers = {peer: _ENDPOINT.validate_json(store.get(_endpoint_key(peer))) for peer in peers_of(rank)}
    with ThreadPoolExecutor(2 * len(peers)) as threads:
        reached = threads.map(_connection_problem, peers.values())
        names = threads.map(_name_problem, peers.values())
        return Connections(endpoint, dict(zip(peers, reached, strict=True)), dict(zip(peers, names, strict=True)))


def _endpoint_key(rank: int) -> str:
    return f"longhaul/connections/endpoint/{rank}"


def _result_key(rank: int) -> str:
    return f"longhaul/connections/result/{rank}"


def _received_key(rank: int) -> str:
    return f"longhaul/connections/received/{rank}"


def _connection_problem(peer: ListeningNode) -> str:
    """Return why another node cannot be reached, by the last attempt; "" if it can."""
    if peer.error:
        return peer.error
    problem = _failed_attempt(peer)
    for pause_s in RETRY_PAUSES_S:
        if not problem:
            break
        time.sleep(pause_s)
        problem = _failed_attempt(peer)
    return problem


def _failed_attempt(peer: ListeningNode) -> str:
    try:
        with socket.create_connection((peer.address, peer.port), CONNECT_S) as connection:
            word = connection.recv(len(peer.word), socket.MSG_WAITALL)
    except TimeoutError:
        return f"{peer.address} does not answer"
    except OSError as error:
        return f"{peer.address}: {error.strerror or error}"
    return "" if word == peer.word.encode() else f"another program answers at {peer.address}"


def _name_problem(peer: ListeningNode) -> str:
    """Return what is wrong with the address that this node finds for another node's name."""
    try:
        found = call_within(CONNECT_S, lambda: _addresses(peer.host))
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
        return f"does not resolve it ({getattr(error, 'strerror', None) or error})"
    return "" if {*found} & {*peer.interfaces} else f"resolves it to {', '.join(found)}"


def _addresses(name: str) -> list[str]:
    return list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)))


@contextmanager
def _listening(rank: Rank) -> Iterator[ListeningNode]:
    """Listen on a port that the kernel chooses, and send the word to each connection."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    interfaces = {name: _ip_addresses(found) for name, found in psutil.net_if_addrs().items()}
    word, everywhere = (
        secrets.token_hex(16),
        [one for found in interfaces.values() for one in found if not is_loopback(one)],
    )
    tried = interfaces.get(interface, []) if interface else _own_addresses(rank.host)
    listener = _listener(tried)
    if listener is None:
        error = f"it has no address on {interface}" if interface else f"no interface has {', '.join(tried)}"
        yield ListeningNode(rank.node_name, rank.host, "", 0, word, interface, everywhere, error)
        return
    with listener:
        Thread(target=_answer_all, args=(listener, word.encode()), daemon=True).start()
        address, port = listener.getsockname()[:2]
        yield ListeningNode(rank.node_name, rank.host, address, port, word, interface, [*everywhere, address])
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _ip_addresses(found: Sequence[Any]) -> list[str]:
    """Return the IPv4 addresses, then those of IPv6 that need no interface's name."""
    return [one.address for family in (socket.AF_INET, socket.AF_INET6) for one in found
            if one.family == family and "%" not in one.address]  # fmt: skip


def _own_addresses(host: str) -> list[str]:
    """Return the addresses of the host's own name, as gloo tries them; gloo takes the loopback where there is none."""
    with suppress(OSError, UnicodeError):
        return call_within(CONNECT_S, lambda: _addresses(host))
    return ["127.0.0.1"]


def _listener(addresses: Iterable[str]) -> socket.socket | None:
    """Return a socket that listens on the first of these addresses that this node has."""
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with suppress(OSError):  # another node's address, or one of IPv6 where the kernel has it off
            return socket.create_server((address, 0), family=family, backlog=_BACKLOG)
    return None


def _answer_all(listener: socket.socket, word: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the listener is closed
            return
        with connection, suppress(OSError):
            connection.sendall(word)
