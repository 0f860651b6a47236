"""The permutation of samples equals its definition in plain Python. Another order would change the results of resumed runs."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from longhaul.data.sampling.permutation import permutation

ALL_BITS = 2**64 - 1


def mixed(value: int) -> int:
    """Return SplitMix64's finalizer of a 64-bit number."""
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & ALL_BITS
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & ALL_BITS
    return value ^ value >> 31


def plain_permutation(seed: int, epoch: int, index: int, size: int) -> int:
    """Return one image: six Feistel rounds over twice `half_bits` bits, repeated until the result is below `size`."""
    half_bits = 1
    while 4**half_bits < size:
        half_bits += 1
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=48).digest()
    keys = [int.from_bytes(digest[start : start + 8], "little") for start in range(0, 48, 8)]
    value = index
    while True:
        left, right = value >> half_bits, value % 2**half_bits
        for key in keys:
            left, right = right, left ^ (mixed(right ^ key) % 2**half_bits)
        value = (left << half_bits) + right
        if value < size:
            return value


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 1000])
def test_small_permutations_equal_the_plain_definition(size: int):
    found = permutation(3, -1, np.arange(size), size)
    assert found.tolist() == [plain_permutation(3, -1, index, size) for index in range(size)]
    assert found.dtype == np.int64


@pytest.mark.parametrize("size", [2**20, 2**20 + 1, 10**12, 2**40 - 1])
def test_large_permutations_equal_the_plain_definition(size: int):
    index = [0, 1, size // 3, size - 1]
    assert permutation(7, 2, np.array(index), size).tolist() == [plain_permutation(7, 2, one, size) for one in index]


def test_images_keep_the_shape_of_the_indices():
    index = np.arange(6).reshape(2, 3)
    assert permutation(1, 2, index, 6).tolist() == permutation(1, 2, index.ravel(), 6).reshape(2, 3).tolist()
    assert permutation(1, 2, np.empty((0, 2), dtype=np.int64), 6).shape == (0, 2)


def test_index_outside_the_size_is_refused():
    permutation(0, 0, np.array([4]), 5)
    with pytest.raises(IndexError) as refused:
        permutation(0, 0, np.array([5, 0]), 5)
    assert str(refused.value) == "index 5 is outside 0..4"
    with pytest.raises(IndexError):
        permutation(0, 0, np.array([5]), 5)
