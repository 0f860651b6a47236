"""Divides tensors into blocks for reading and writing; number of threads of an export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longhaul.checkpoint_io import raw_bytes
from longhaul.export.exported_tensors import BLOCK_ELEMENTS, ExportedTensor

COPYING_THREADS = 4
HASHING_THREADS = 4


def blocks(numel: int, block: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges [start, stop) of at most `block` elements that cover `numel` elements."""
    for start in range(0, numel, block):
        yield start, min(start + block, numel)


def blocks_of(tensor: ExportedTensor) -> Iterator[tuple[int, int]]:
    """Yield the ranges in which an exported tensor is read and written."""
    return blocks(tensor.numel, tensor.block_elements)


def exported_bytes(tensor: ExportedTensor, start: int, stop: int) -> memoryview:
    """Return the bytes that elements [start, stop) of an exported tensor have in the file."""
    return raw_bytes(tensor.values(start, stop))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with `count` threads inside the block. Rounding depends on this number.

    Python threads that start inside the block use the same number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
