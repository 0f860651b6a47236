"""How the ranks of a job meet: bounded in time, and naming who did not come.

torch's own rendezvous says only how many are missing. Here every rank announces itself in rank 0's store first, so
that a node that never started is named before any collective waits for it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from longhaul.errors import UserError, first_line
from longhaul.runtime.rank import Rank, export_rank

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]


class RendezvousError(UserError):
    """Ranks that did not meet; on other nodes, or a minute later, they may."""

    failure_class = "node"


MEET_S = 180.0
"""Nodes of one srun start within seconds; imports from a cold shared file system take up to minutes."""


@contextmanager
def process_group(rank: Rank, backend: str, timeout_s: float, meet_s: float = MEET_S) -> Iterator[None]:
    """All ranks' default process group ("gloo" or "nccl") for the length of the block.

    A rank that does not come within `meet_s`, or a network the backend cannot use, is a RendezvousError on every rank that
    came. A collective that waits longer than `timeout_s` raises torch's error.
    """
    import torch
    import torch.distributed as dist

    export_rank(rank)
    store = _meet(rank, meet_s)
    device = torch.device("cuda", rank.local_rank) if backend == "nccl" else None
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
    try:
        yield
    finally:
        dist.destroy_process_group()


def _meet(rank: Rank, meet_s: float) -> TCPStore:
    """The store that rank 0 serves at MASTER_ADDR:MASTER_PORT, once every rank has announced itself in it."""
    from torch.distributed import DistError

    try:
        store = _open_store(rank, meet_s)
        store.set(f"longhaul/host/{rank.rank}", rank.host)
        missing: list[int] = []
        if rank.is_main:
            missing = _wait_for(store, "host", range(rank.world_size), meet_s)
            store.set("longhaul/verdict", _missing_message(missing, rank, meet_s) if missing else "all here")
        verdict = store.get("longhaul/verdict").decode()
        store.set(f"longhaul/told/{rank.rank}", "")
        if missing:  # the store ends with rank 0: whoever came is to hear why, and not that nobody answers
            _wait_for(store, "told", set(range(rank.world_size)) - set(missing), _grace_s(meet_s))
    except (DistError, OSError) as error:
        raise _unreachable(rank, meet_s, error) from None
    if verdict != "all here":
        raise RendezvousError(
            verdict, "look in the job's log for why they did not start: a drained node, a failed module or mount"
        )
    return store


def _open_store(rank: Rank, meet_s: float) -> TCPStore:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        rank.world_size,
        # torchrun's agent serves the store itself, and says so
        is_master=rank.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        # the others outwait rank 0, which tells them who is missing
        timeout=timedelta(seconds=meet_s if rank.is_main else meet_s + _grace_s(meet_s)),
        wait_for_workers=False,
    )


def _grace_s(meet_s: float) -> float:
    """How long, after `meet_s`, the ranks that came have for telling each other who did not."""
    return min(10.0, meet_s)


def _wait_for(store: TCPStore, what: str, ranks: Iterable[int], seconds: float) -> list[int]:
    """Those of the ranks that have not set their key `what` after so many seconds."""
    deadline = time.monotonic() + seconds
    missing = sorted(ranks)
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"longhaul/{what}/{rank}"])]
        if missing:
            time.sleep(0.05)
    return missing


def _missing_message(missing: list[int], rank: Rank, meet_s: float) -> str:
    text = f"{len(missing)} of {rank.world_size} ranks did not come within {meet_s:g} s: {_listed(missing)}"
    nodes = node_names(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "")
    ranks_per_node = max(1, rank.world_size // rank.nodes)
    if len(nodes) != rank.nodes:
        return text
    names = dict.fromkeys(nodes[missed // ranks_per_node] for missed in missing)
    return f"{text}, on {', '.join(names)}"


def _listed(ranks: list[int], limit: int = 16) -> str:
    more = f" and {len(ranks) - limit} more" if len(ranks) > limit else ""
    return ", ".join(map(str, ranks[:limit])) + more


def node_names(nodelist: str) -> list[str]:
    """Slurm's host list as single names, in order: "n[01-02,7],gpu1" -> n01 n02 n7 gpu1 (one bracket a name)."""
    names: list[str] = []
    for prefix, ranges, suffix in re.findall(r"([^,\[]+)(?:\[([^\]]*)\])?([^,\[]*)", nodelist):
        names += [f"{prefix}{number}{suffix}" for number in _numbers(ranges)] if ranges else [prefix + suffix]
    return names


def _numbers(ranges: str) -> Iterator[str]:
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield str(number).zfill(len(first))


def _unreachable(rank: Rank, meet_s: float, error: Exception) -> RendezvousError:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if rank.is_main:
        return RendezvousError(
            f"{rank.host}: rank 0 cannot serve the rendezvous at {address}: {first_line(error)}",
            "MASTER_ADDR must be this node and MASTER_PORT free; start through launch.sh, which sets both",
        )
    return RendezvousError(
        f"{rank.host}: rank {rank.rank} did not reach rank 0 at {address} within {meet_s:g} s: {first_line(error)}",
        "check that rank 0's node is up, and that no firewall closes ports between compute nodes",
    )


def _interface_hint(backend: str, environ: Mapping[str, str] = os.environ) -> str:
    name = f"{backend.upper()}_SOCKET_IFNAME"
    found = environ.get(name)
    return f"set interconnect.socket_interface in the site file to an interface all nodes share ({name} is {found or 'not set'})"
