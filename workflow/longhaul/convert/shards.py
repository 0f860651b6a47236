"""Writes tensors as safetensors files, streamed: memory stays at one chunk per thread, whatever the model's size.

Format: 8 bytes little-endian header length, JSON header, data. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from longhaul.artifacts import write_json
from longhaul.convert.layout import ExportedTensor

SHARD_BYTES = 5 * 10**9
CHUNK_ELEMENTS = 1 << 24  # 64 MiB of fp32
WRITING_THREADS = 4
INDEX = "model.safetensors.index.json"
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_shards(folder: Path, tensors: Sequence[ExportedTensor], shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Writes the tensors as model.safetensors, or as numbered shards and an index; returns name -> SHA-256 of each shard."""
    shards = _split(tensors, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        _write_index(folder, names, shards)
    with ThreadPoolExecutor(WRITING_THREADS) as pool:
        paths = [folder / name for name in names]
        return dict(zip(names, pool.map(_write_shard, paths, shards), strict=True))


def chunks(numel: int, chunk: int = CHUNK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """The ranges [start, stop) of at most `chunk` elements that make up `numel`."""
    for start in range(0, numel, chunk):
        yield start, min(start + chunk, numel)


def exported_bytes(tensor: ExportedTensor, start: int, stop: int) -> memoryview:
    """The bytes that elements [start, stop) of an exported tensor have in the file."""
    values = tensor.master.read_range(tensor.start + start, tensor.start + stop)
    return memoryview(values.to(tensor.dtype).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


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
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shard(path: Path, tensors: list[ExportedTensor]) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as stream:

        def write(data: bytes | memoryview) -> None:
            stream.write(data)
            digest.update(data)

        write(_header(tensors))
        for tensor in tensors:
            for start, stop in chunks(tensor.numel):
                write(exported_bytes(tensor, start, stop))
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()
