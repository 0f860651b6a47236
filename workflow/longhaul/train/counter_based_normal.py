"""Draws normal random numbers for initial weights: SplitMix64 by key and index, with the same bits on CPUs and GPUs.

torch's generators differ between devices, and their numbers depend on what was drawn before. Here the number of element i
follows from a key and i alone: 64 random bits of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators"), then the sum of two entries of tables of normal quantiles. Only integers, table entries and one addition are
involved, so no device rounds differently.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from statistics import NormalDist

import torch

_LEVELS = 1 << 16
_SHARES = (0.8, 0.6)
"""Weights of the two table entries; their squares add up to 1, so the sum of two normal numbers is normal again."""
_CHUNK_ELEMENTS = {"cpu": 1 << 15, "cuda": 1 << 26}
_GAMMA, _FIRST, _SECOND = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""SplitMix64's constants as signed numbers: torch has no products of unsigned ones."""


def normal(key: str, shape: torch.Size, std: float, device: torch.device) -> torch.Tensor:
    """Return fp32 numbers of mean 0 and the given standard deviation that follow from the key and their index."""
    begin = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    tables = [table.to(device) for table in _tables(std)]
    values = torch.empty(math.prod(shape), device=device)
    elements = _CHUNK_ELEMENTS[device.type]
    with _one_cpu_thread():
        for first in range(0, len(values), elements):
            chunk = values[first : first + elements]
            bits = _random_bits(begin, first, len(chunk), device)
            torch.index_select(tables[0], 0, bits & (_LEVELS - 1), out=chunk)
            chunk.add_(tables[1][(bits >> 16) & (_LEVELS - 1)])
    return values.view(shape)


@contextmanager
def _one_cpu_thread() -> Iterator[None]:
    """Let torch use one thread of the CPU: on busy cores, waiting for the others after every small operation takes far longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _random_bits(begin: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """Return 64 random bits for each of the elements [first, first + count) as int64."""
    bits = torch.arange(first + 1, first + 1 + count, device=device).mul_(_GAMMA).add_(begin)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        bits.bitwise_xor_(_shifted(bits, shift)).mul_(factor)
    return bits.bitwise_xor_(_shifted(bits, 31))


def _shifted(bits: torch.Tensor, shift: int) -> torch.Tensor:
    """Shift to the right and fill with zeros; torch fills with the sign."""
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)


@cache
def _tables(std: float) -> list[torch.Tensor]:
    """Return the quantiles of a normal distribution for each of the two shares, in fp32."""
    upper = [NormalDist().inv_cdf((level + 0.5) / _LEVELS) for level in range(_LEVELS // 2, _LEVELS)]
    scale = std / math.sqrt(sum(value * value for value in upper) / len(upper))
    quantiles = torch.tensor([-value for value in reversed(upper)] + upper, dtype=torch.float64)
    return [(quantiles * (scale * share)).float() for share in _SHARES]
