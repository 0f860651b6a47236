"""Writes safetensors shards (5 GB each) and their index, block by block in bounded memory. Memory stays at one block per thread,
for any size of the model.

Format: 8 bytes little-endian header length, JSON header, data. Source: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from longhaul.artifacts.atomic_files import write_json
from longhaul.checkpoint_io import DTYPE_NAMES
from longhaul.export.exported_tensors import ExportedTensor
from longhaul.export.tensor_blocks import COPYING_THREADS, blocks_of, exported_bytes, torch_threads

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPE_NAMES.items()}
"""torch's data type -> its name in a safetensors header."""


def write_shards(folder: Path, tensors: Sequence[ExportedTensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write the tensors as model.safetensors, or as numbered shards and an index. All files are on the disk at return."""
    shards = _split_into_shards(tensors, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        _write_index(folder, names, shards)
    with torch_threads(1), ThreadPoolExecutor(COPYING_THREADS) as pool:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(folder / name, shard, pool)


def _split_into_shards(tensors: Sequence[ExportedTensor], shard_bytes: int) -> list[list[ExportedTensor]]:
    shards: list[list[ExportedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size_bytes
    # Wide types first: readers need each tensor to start at a multiple of its element's size.
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _write_index(folder: Path, names: list[str], shards: list[list[ExportedTensor]]) -> None:
    tensors = [tensor for shard in shards for tensor in shard]
    metadata = {
        "total_parameters": sum(tensor.numel for tensor in tensors),
        "total_size": sum(tensor.size_bytes for tensor in tensors),
    }
    file_of_tensor = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(file_of_tensor.items()))})


def _header(tensors: list[ExportedTensor]) -> bytes:
    """Return a shard's header, padded to a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size_bytes
        entries[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shard(path: Path, tensors: list[ExportedTensor], pool: Executor) -> None:
    header = _header(tensors)
    with path.open("wb", buffering=0) as stream:
        stream.write(header)
        for _ in pool.map(partial(_write_block, stream.fileno()), _blocks_of_shard(tensors, len(header))):
            pass
        os.fsync(stream.fileno())


def _blocks_of_shard(tensors: list[ExportedTensor], offset: int) -> Iterator[tuple[ExportedTensor, int, int, int]]:
    """Yield (tensor, start, stop, byte offset in the file) in the order of the file."""
    for tensor in tensors:
        for start, stop in blocks_of(tensor):
            yield tensor, start, stop, offset + start * tensor.dtype.itemsize
        offset += tensor.size_bytes


def _write_block(descriptor: int, block: tuple[ExportedTensor, int, int, int]) -> None:
    tensor, start, stop, offset = block
    data = exported_bytes(tensor, start, stop)
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)
