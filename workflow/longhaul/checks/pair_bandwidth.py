"""Measures latency and bandwidth between two ranks that exchange messages in both directions at once; over NCCL or gloo.

Both ranks of a pair call the same functions in the same order. The messages go through the process group of all ranks, so
that a pair needs no communicator of its own.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from longhaul.checks.packet_loss import read_tcp_segments
from longhaul.checks.pair_evidence import PairMeasurement

_FLOAT_BYTES = 4
_LATENCY_ROUNDS = 15
_PROBE_BYTES = 2**20
_LEAST_BYTES = 2**16
_MOST_BYTES = {"cpu": 2**24, "cuda": 2**26}
_WINDOWS, _WINDOW_S = 3, 0.04
"""The best of several short windows counts: another process that takes the CPU for a moment spoils one of them."""
_MESSAGES_PER_WINDOW = 4
_MOST_WAIT_S = 30.0
"""Shorter than the time-out of the process group: after that, torch ends the processes of all ranks, and names no pair."""


class PairMeter:
    """Measures this rank's exchange with other ranks. `device` holds the messages."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._most_bytes = _MOST_BYTES[device.type]
        self._outgoing = torch.full((self._most_bytes // _FLOAT_BYTES,), float(rank + 1), device=device)
        self._incoming = torch.zeros_like(self._outgoing)

    def measure(self, peer: int) -> PairMeasurement:
        """Exchange messages with another rank, which measures this one at the same time."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has a device of its own
        before = read_tcp_segments()
        self._exchange(peer, 8)  # opens the connection
        latency_s = statistics.median(self._exchange(peer, 8) for _ in range(_LATENCY_ROUNDS))
        probe_s = self._exchange(peer, _PROBE_BYTES)
        size_bytes, rounds = self._agree(peer, *_window_size(_PROBE_BYTES / probe_s, self._most_bytes))
        fastest_s = min(self._mean_exchange(peer, size_bytes, rounds) for _ in range(_WINDOWS))
        is_correct = self._has_values_of(peer, size_bytes)
        resent = self._larger(peer, read_tcp_segments().share_resent_since(before))
        return PairMeasurement(size_bytes / fastest_s / 1e9, latency_s * 1e6, is_correct, resent)

    def _mean_exchange(self, peer: int, size_bytes: int, rounds: int) -> float:
        return sum(self._exchange(peer, size_bytes) for _ in range(rounds)) / rounds

    def _exchange(self, peer: int, size_bytes: int) -> float:
        """Send and receive one message. Return the seconds until this rank has sent its own and received the other one."""
        elements = size_bytes // _FLOAT_BYTES
        started = time.perf_counter()
        self._swap(peer, self._outgoing[:elements], self._incoming[:elements])
        return time.perf_counter() - started

    def _swap(self, peer: int, outgoing: torch.Tensor, incoming: torch.Tensor) -> None:
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, outgoing, peer), dist.P2POp(dist.irecv, incoming, peer)]
        ):
            work.wait()
        if self._device.type == "cuda":
            _wait_for_gpu(self._device)

    def _agree(self, peer: int, size_bytes: int, rounds: int) -> tuple[int, int]:
        """Return the message size and the rounds that the lower rank of the pair has computed."""
        own = torch.tensor([size_bytes, rounds], device=self._device)
        other = torch.empty_like(own)
        self._swap(peer, own, other)
        agreed_bytes, agreed_rounds = (own if self._rank < peer else other).tolist()
        return agreed_bytes, agreed_rounds

    def _larger(self, peer: int, value: float) -> float:
        """Return the larger of this rank's value and the other one's."""
        own = torch.tensor([value], device=self._device)
        other = torch.empty_like(own)
        self._swap(peer, own, other)
        return float(torch.maximum(own, other).item())

    def _has_values_of(self, peer: int, size_bytes: int) -> bool:
        return bool((self._incoming[: size_bytes // _FLOAT_BYTES] == peer + 1).all())


def _wait_for_gpu(device: torch.device) -> None:
    """Wait until the GPU's queue is empty.

    Over NCCL, wait() of a message returns at once, and on a broken link torch.cuda.synchronize never returns.

    Raises:
        RuntimeError: a message did not arrive.
    """
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    started = time.monotonic()
    while not done.query():
        if time.monotonic() - started > _MOST_WAIT_S:
            raise RuntimeError(f"no message arrived within {_MOST_WAIT_S:g} s")


def _window_size(bytes_per_s: float, most_bytes: int) -> tuple[int, int]:
    """Return message size and number of messages so that a window takes about _WINDOW_S seconds at this rate."""
    wanted = int(bytes_per_s * _WINDOW_S)
    size_bytes = min(most_bytes, max(_LEAST_BYTES, wanted // _MESSAGES_PER_WINDOW))
    size_bytes -= size_bytes % _FLOAT_BYTES
    return size_bytes, min(64, max(1, wanted // size_bytes))
