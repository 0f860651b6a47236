"""Shuffles samples: a seeded pseudo-random permutation (Feistel network) for each epoch, without a table in memory.

The permutation is a Feistel network over the next power of two with an even exponent, applied repeatedly until the
result is below n (cycle walking; J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). It orders
training samples and is not secure for cryptography.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6


def permutation(seed: int, epoch: int, index: np.ndarray, size: int) -> np.ndarray:
    """Return the images of `index` [any shape] under the epoch's permutation of 0..size-1; int64, same shape.

    Raises:
        IndexError: an index is not in 0..size-1.
    """
    values = np.asarray(index, dtype=np.uint64)
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < size:
        raise IndexError(f"index {int(values.max())} is outside 0..{size - 1}")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    result = _encrypt(values.ravel(), keys, half_bits)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _encrypt(result[outside], keys, half_bits)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64).reshape(values.shape)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def _encrypt(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    shift, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & low
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & low)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Mix the bits with the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
