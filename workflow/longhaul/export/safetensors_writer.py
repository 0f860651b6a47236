"""Writes tensors as safetensors files, streamed: memory stays at one chunk per thread, whatever the model's size.

Format: 8 bytes little-endian header length, JSON header, data. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from longhaul.artifacts.files import write_json
from longhaul.checkpoint_io import DTYPE_NAMES, raw_bytes
from longhaul.export.tensor_layout import ExportedTensor
from longhaul.export.torch_threads import torch_threads

SHARD_BYTES = 5 * 10**9
CHUNK_ELEMENTS = 1 << 20  # 4 MiB of fp32: stays in the processor's cache from read to write
COPYING_THREADS = 4
INDEX = "model.safetensors.index.json"
NAMES = {dtype: name for name, dtype in DTYPE_NAMES.items()}


def write_shards(folder: Path, tensors: Sequence[ExportedTensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the tensors as model.safetensors, or as numbered shards and an index, on the disk when it returns."""
    shards = _split(tensors, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        _write_index(folder, names, shards)
    with torch_threads(1), ThreadPoolExecutor(COPYING_THREADS) as pool:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(folder / name, shard, pool)


def chunks(numel: int, chunk: int = CHUNK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """The ranges [start, stop) of at most `chunk` elements that make up `numel`."""
    for start in range(0, numel, chunk):
        yield start, min(start + chunk, numel)


def exported_bytes(tensor: ExportedTensor, start: int, stop: int) -> memoryview:
    """The bytes that elements [start, stop) of an exported tensor have in the file."""
    return raw_bytes(tensor.master.read_range(tensor.start + start, tensor.start + stop).to(tensor.dtype))


def _split(tensors: Sequence[ExportedTensor], shard_bytes: int) -> list[list[ExportedTensor]]:
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
    total = {
        "total_parameters": sum(tensor.numel for tensor in tensors),
        "total_size": sum(tensor.size_bytes for tensor in tensors),
    }
    places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_json(folder / INDEX, {"metadata": total, "weight_map": dict(sorted(places.items()))})


def _header(tensors: list[ExportedTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size_bytes
        entries[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
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
        for _ in pool.map(partial(_write_chunk, stream.fileno()), _chunks_of_shard(tensors, len(header))):
            pass
        os.fsync(stream.fileno())


def _chunks_of_shard(tensors: list[ExportedTensor], offset: int) -> Iterator[tuple[ExportedTensor, int, int, int]]:
    """(tensor, start, stop, byte in the file) in the file's order."""
    for tensor in tensors:
        for start, stop in chunks(tensor.numel):
            yield tensor, start, stop, offset + start * tensor.dtype.itemsize
        offset += tensor.size_bytes


def _write_chunk(descriptor: int, work: tuple[ExportedTensor, int, int, int]) -> None:
    tensor, start, stop, offset = work
    data = exported_bytes(tensor, start, stop)
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
