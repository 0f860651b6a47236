"""Joins all ranks in a process group within 180 s, and names the ranks and nodes that are missing.

torch's own rendezvous only counts the missing ranks. Here every rank first registers in rank 0's store. So a node that
never started is named before any collective waits for it.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from longhaul.errors import UserError, first_line
from longhaul.runtime.call_with_deadline import call_within
from longhaul.runtime.process_rank import Rank, export_rank
from longhaul.runtime.rank_placement import gpu_index
from longhaul.runtime.rdma_variables import set_rdma_variables

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]


class RendezvousError(UserError):
    """Ranks are missing or cannot connect. On other nodes, or a minute later, the rendezvous may succeed."""

    failure_class = "node"


RENDEZVOUS_TIMEOUT_S = 180.0
"""Nodes of one srun start within seconds. Imports from a cold shared file system take up to minutes."""
_COMPLETE = "complete"
_RESULT_KEY = "longhaul/rendezvous"
_POLL_INTERVAL_S = 0.05
_NAME_ANSWER_S = 30.0
"""A resolver asks its servers for up to so long. A daemon of the node between them may never answer."""
_LOOKUP_S = 10.0
"""The resolver asks a name server that does not answer twice, and waits 5 s each time."""
_NAME_SERVICE_S, _NAME_RETRY_INTERVAL_S = 5.0, 1.0
"""A busy name service may miss a question. So many seconds without an answer are a wrong name."""


def host_key(rank: int) -> str:
    """Return the key of rank 0's store under which a rank registers its host."""
    return f"longhaul/host/{rank}"


def _received_key(rank: int) -> str:
    """Return the key with which a rank confirms that it has read the result."""
    return f"longhaul/received/{rank}"


@contextmanager
def process_group(
    rank: Rank,
    backend: str,
    timeout_s: float,
    rendezvous_timeout_s: float = RENDEZVOUS_TIMEOUT_S,
    store: TCPStore | None = None,
) -> Iterator[None]:
    """Provide the default process group of all ranks during a `with` block.

    backend:   "gloo" or "nccl"
    timeout_s: time-out of each collective, after which torch raises its own error
    store:     of meet(), where the ranks have met already

    Raises:
        RendezvousError: on every rank that arrived, if a rank does not arrive within `rendezvous_timeout_s` or the backend
                         cannot use the network.
    """
    import torch
    import torch.distributed as dist

    export_rank(rank)
    if backend == "nccl":
        os.environ["LOCAL_RANK"] = str(gpu_index(rank))  # DeepSpeed takes it for the GPU
        _tell_nccl_about_adapters(rank)
    store = store or meet(rank, rendezvous_timeout_s)
    device = torch.device("cuda", gpu_index(rank)) if backend == "nccl" else None
    if device:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=rank.rank,
            world_size=rank.world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device,
        )
    except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
        raise RendezvousError(
            f"{rank.host}: rank {rank.rank} cannot open {backend} connections to the other ranks: {first_line(error)}",
            _interface_hint(backend),
        ) from None
    is_healthy = False
    try:
        yield
        is_healthy = True
    finally:
        # After an error, NCCL would wait here for messages that never come. At the end of the process, torch aborts them.
        if is_healthy or backend != "nccl":
            dist.destroy_process_group()


def _tell_nccl_about_adapters(rank: Rank) -> None:
    from torch.cuda import nccl

    lines = set_rdma_variables(nccl.version()[:3])
    for line in lines if rank.local_rank == 0 else ():
        print(f"{rank.host}: {line}", flush=True)


def meet(rank: Rank, timeout_s: float = RENDEZVOUS_TIMEOUT_S) -> TCPStore:
    """Return the store that rank 0 serves at MASTER_ADDR:MASTER_PORT, after every rank has registered in it."""
    from torch.distributed import DistError

    _require_known_name(rank, os.environ["MASTER_ADDR"])
    try:
        store = _open_store(rank, timeout_s)
        store.set(host_key(rank.rank), rank.host)
        missing: list[int] = []
        if rank.is_main:
            missing = _missing_ranks(store, rank, timeout_s)
            store.set(_RESULT_KEY, _missing_message(missing, rank, timeout_s) if missing else _COMPLETE)
        result = store.get(_RESULT_KEY).decode()
        store.set(_received_key(rank.rank), "")
        if missing:  # the store ends with rank 0, so rank 0 waits until the others have read which ranks are missing
            wait_for_keys(store, _received_key, set(range(rank.world_size)) - set(missing), _grace_s(timeout_s))
    except (DistError, OSError) as error:
        raise _with_slow_lookups(_unreachable(rank, timeout_s, error), rank, timeout_s) from None
    if result != _COMPLETE:
        hint = "read in the job's log why they did not start: a drained node, a failed module or mount"
        raise _with_slow_lookups(RendezvousError(result, hint), rank, timeout_s)
    return store


def _require_known_name(rank: Rank, name: str) -> None:
    """Raise UserError if this node finds no address of rank 0's node. torch would ask again until the rendezvous times out."""
    deadline = time.monotonic() + _NAME_SERVICE_S
    while problem := _name_problem(name):
        if time.monotonic() > deadline:
            raise UserError(
                f"{rank.host}: rank {rank.rank} cannot resolve {name}, the name of rank 0's node: {problem}",
                "set interconnect.master_address in the site file to an interface of the nodes, or to the suffix of a name that "
                "they resolve; then run the same command again",
            )
        time.sleep(_NAME_RETRY_INTERVAL_S)


def _name_problem(name: str) -> str:
    try:
        call_within(_NAME_ANSWER_S, lambda: socket.getaddrinfo(name, None))
    except (OSError, UnicodeError) as error:
        return str(getattr(error, "strerror", None) or error)
    return ""


def _open_store(rank: Rank, timeout_s: float) -> TCPStore:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        rank.world_size,
        # torchrun's agent may serve the store; it then sets this variable
        is_master=rank.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        # the others wait longer than rank 0, which sends them the numbers of the missing ranks
        timeout=timedelta(seconds=timeout_s if rank.is_main else timeout_s + _grace_s(timeout_s)),
        wait_for_workers=False,
    )


def _missing_ranks(store: TCPStore, rank: Rank, timeout_s: float) -> list[int]:
    """Return the ranks that do not arrive in time. Where they have more than the usual time, the log names them earlier, too."""
    usual_s = min(timeout_s, RENDEZVOUS_TIMEOUT_S)
    missing = wait_for_keys(store, host_key, range(rank.world_size), usual_s)
    if missing and timeout_s > usual_s:
        text = _missing_message(missing, rank, usual_s)
        print(f"{rank.host}: {text}; rank 0 waits for {timeout_s - usual_s:g} s more", flush=True)
        missing = wait_for_keys(store, host_key, missing, timeout_s - usual_s)
    return missing


def _grace_s(timeout_s: float) -> float:
    """Return the time after `timeout_s` in which rank 0 sends the list of missing ranks to those that arrived."""
    return min(10.0, timeout_s)


def wait_for_keys(store: TCPStore, key_of: Callable[[int], str], ranks: Iterable[int], seconds: float) -> list[int]:
    """Wait until all these ranks have set their key; return those that have not after `seconds`.

    One request asks for all keys: thousands of requests per look would keep rank 0's store from the ranks that register.
    """
    deadline, waited_for = time.monotonic() + seconds, sorted(ranks)
    while not store.check([key_of(rank) for rank in waited_for]):
        if time.monotonic() > deadline:
            return [rank for rank in waited_for if not store.check([key_of(rank)])]
        time.sleep(_POLL_INTERVAL_S)
    return []


def _missing_message(missing: list[int], rank: Rank, timeout_s: float) -> str:
    text = f"{len(missing)} of {rank.world_size} ranks did not arrive within {timeout_s:g} s: {_listed(missing)}"
    nodes = parse_node_list(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "")
    ranks_per_node = max(1, rank.world_size // rank.nodes)
    if len(nodes) != rank.nodes:
        return text
    names = dict.fromkeys(nodes[missed // ranks_per_node] for missed in missing)
    return f"{text}, on {', '.join(names)}"


def _listed(ranks: list[int], limit: int = 16) -> str:
    more = f" and {len(ranks) - limit} more" if len(ranks) > limit else ""
    return ", ".join(map(str, ranks[:limit])) + more


def parse_node_list(node_list: str) -> list[str]:
    """Return the single names of Slurm's compressed node list, in order, without a Slurm client.

    n[01-02,7],gpu1 -> n01 n02 n7 gpu1. A name may have one bracket.
    """
    names: list[str] = []
    for prefix, ranges, suffix in re.findall(r"([^,\[]+)(?:\[([^\]]*)\])?([^,\[]*)", node_list):
        names += [f"{prefix}{number}{suffix}" for number in _numbers(ranges)] if ranges else [prefix + suffix]
    return names


def _numbers(ranges: str) -> Iterator[str]:
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield str(number).zfill(len(first))


def _unreachable(rank: Rank, timeout_s: float, error: Exception) -> RendezvousError:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if rank.is_main:
        return RendezvousError(
            f"{rank.host}: rank 0 cannot serve the rendezvous at {address}: {first_line(error)}",
            "MASTER_ADDR must be this node and MASTER_PORT free; start through launch.sh, which sets both",
        )
    return RendezvousError(
        f"{rank.host}: rank {rank.rank} did not reach rank 0 at {address} within {timeout_s:g} s: {first_line(error)}",
        "check that rank 0's node is up, and that no firewall blocks ports between compute nodes",
    )


def _with_slow_lookups(error: RendezvousError, rank: Rank, timeout_s: float) -> RendezvousError:
    """Return the error, or one that names the name service where it takes too long for so many ranks.

    Before torch's store reads from a connection, it asks for the name of the connection's address, one after the other
    (formatSockAddr in torch/csrc/distributed/c10d/socket.cpp).
    """
    lookup_s = _lookup_s(os.environ["MASTER_ADDR"])
    if lookup_s * rank.world_size < timeout_s:
        return error
    return RendezvousError(
        f"{error.message}; the name service took {lookup_s:.2g} s for the name of one address, and torch's store asks it for "
        f"that of each of the {rank.world_size} ranks",
        "let the admins enter the nodes' addresses in the reverse zone of the name service, or run a cache such as nscd on the "
        "nodes",
    )


def _lookup_s(name: str) -> float:
    """Return the seconds that the lookup of the name of rank 0's address takes, _LOOKUP_S at most."""
    began_s = time.monotonic()
    with suppress(OSError, UnicodeError):  # an address without a name is an answer
        call_within(_LOOKUP_S, lambda: socket.getnameinfo(_ipv6_address(name), 0))
    return time.monotonic() - began_s


def _ipv6_address(name: str) -> tuple[str, int, int, int]:
    """Return rank 0's address as torch's store sees those of its peers: it listens on IPv6, to which Linux maps IPv4."""
    found = socket.getaddrinfo(name, 0, socket.AF_INET6, socket.SOCK_STREAM, flags=socket.AI_V4MAPPED)
    address: tuple[str, int, int, int] = found[0][4]  # pyright: ignore[reportAssignmentType]
    return address


def _interface_hint(backend: str, environ: Mapping[str, str] = os.environ) -> str:
    name = f"{backend.upper()}_SOCKET_IFNAME"
    found = environ.get(name)
    return (
        "set interconnect.socket_interface in the site file to an interface that all nodes have"
        f" ({name} is {found or 'not set'})"
    )
