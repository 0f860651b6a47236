"""Measures the bandwidth of a node's memory with the triad of the STREAM benchmark, a = b + s c, on all cores of the job."""

from __future__ import annotations

import os
import time

import torch

_ROUNDS = 5
_ARRAYS = 3
"""The triad reads b and c and writes a; STREAM counts these bytes (cs.virginia.edu/stream/ref.html)."""


def triad_gb_per_s(array_bytes: int) -> float:
    """Return the best rate of some triads in GB/s.

    array_bytes: size of each of the three arrays; larger than the caches, else the caches are measured
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        b_N, c_N = (torch.ones(array_bytes // 8, dtype=torch.float64) for _ in range(2))
        a_N = torch.zeros_like(b_N)  # each thread touches its part first, so the part is in the memory next to its core
        return round(max(_triad_rate(a_N, b_N, c_N) for _ in range(_ROUNDS)), 2)
    finally:
        torch.set_num_threads(threads)


def _triad_rate(a_N: torch.Tensor, b_N: torch.Tensor, c_N: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.add(b_N, c_N, alpha=3.0, out=a_N)
    return _ARRAYS * a_N.nbytes / (time.perf_counter() - started) / 1e9
