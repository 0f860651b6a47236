"""Proves an export's tensors against those the trainer gathered from the live engine when it saved the checkpoint.

proof/tensors.json: SHA-256 of every parameter and buffer as gathered, in fp32 and as cast for the export.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from longhaul.artifacts.files import read_json
from longhaul.checkpoint_io import LazyTensor, open_safetensors, raw_bytes
from longhaul.errors import UserError
from longhaul.export.safetensors_writer import NAMES, chunks, exported_bytes
from longhaul.export.tensor_layout import ExportedTensor
from longhaul.export.torch_threads import torch_threads

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HASHING_THREADS = 4
NO_EXPORT = (
    "nothing was exported; this is a fault of the software, not of the config: keep the checkpoint and report it"
)


def prove_tensors(
    folder: Path, tensors: Sequence[ExportedTensor], proof_folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Re-reads the export, puts every model tensor together again and compares its SHA-256 with the trainer's.

    Raises:
        UserError: a tensor is missing, left over, of another shape or type, or its bytes differ.
    """
    recorded = read_json(proof_folder / "tensors.json")
    parts = {source: list(group) for source, group in groupby(tensors, key=lambda tensor: tensor.source)}
    if differing := sorted(set(parts) ^ set(recorded)):
        raise UserError(f"{differing[0]} is in only one of the export and the trainer's proof", NO_EXPORT)
    stored = open_export(folder)
    if differing := sorted({tensor.name for tensor in tensors} ^ set(stored)):
        raise UserError(f"{differing[0]} is in only one of the written files and the model", NO_EXPORT)

    def prove(source: str) -> None:
        found = _sha256(data for tensor in parts[source] for data in _file_bytes(stored[tensor.name], tensor))
        wanted = _expected_sha256(source, parts[source], recorded[source])
        if found != wanted:
            raise UserError(f"exported tensor {source} has SHA-256 {found}, the trained one {wanted}", NO_EXPORT)

    with torch_threads(1), ThreadPoolExecutor(HASHING_THREADS) as pool:
        list(pool.map(prove, parts))
    return {"count": len(parts), "equal": len(parts), "files_hold": len(tensors), "dtype": dtype_name(dtype)}


def open_export(folder: Path) -> dict[str, LazyTensor]:
    """Name -> the tensor that the export's files hold under it.

    Raises:
        UserError: a name is in two files, or safetensors itself reads other names, types or shapes in them.
    """
    found: dict[str, LazyTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        opened = open_safetensors(path)
        if doubled := sorted(set(opened) & set(found)):
            raise UserError(f"{doubled[0]} is in two files of the export", NO_EXPORT)
        with safe_open(path, "pt") as official:
            read = {name: _described(official.get_slice(name)) for name in official.keys()}  # noqa: SIM118 (not a dict)
        if read != {name: (NAMES[tensor.pieces[0].dtype], list(tensor.shape)) for name, tensor in opened.items()}:
            raise UserError(f"{path.name} holds other tensors than its header was meant to say", NO_EXPORT)
        found |= opened
    return found


def _described(stored: Any) -> tuple[str, list[int]]:
    return stored.get_dtype(), stored.get_shape()


def _file_bytes(stored: LazyTensor, tensor: ExportedTensor) -> Iterator[memoryview]:
    """The tensor's bytes as the file holds them."""
    piece = stored.pieces[0]
    if (piece.dtype, stored.shape) != (tensor.dtype, tensor.shape):
        raise UserError(
            f"exported tensor {tensor.name} is {piece.dtype} {list(stored.shape)}, "
            f"not {tensor.dtype} {list(tensor.shape)}",
            NO_EXPORT,
        )
    for start, stop in chunks(tensor.numel):
        yield raw_bytes(piece.part(start, stop).read())


def _expected_sha256(source: str, group: list[ExportedTensor], entry: dict[str, Any]) -> str:
    """The trainer's hash of the bytes that the export should hold.

    A stage may be exported in another dtype than it was trained for; then the fp32 masters are proved to be those the
    trainer hashed, and their cast is hashed here.
    """
    if group[0].dtype == torch.float32:
        return entry["sha256_fp32"]
    if entry["sha256_export"] != entry["sha256_fp32"]:
        return entry["sha256_export"]
    master = group[0].master
    found = _sha256(raw_bytes(master.read_range(start, stop)) for start, stop in chunks(master.numel))
    if found != entry["sha256_fp32"]:
        raise UserError(
            f"master weights of {source} have SHA-256 {found}, the trained {entry['sha256_fp32']}", NO_EXPORT
        )
    return _sha256(exported_bytes(tensor, start, stop) for tensor in group for start, stop in chunks(tensor.numel))


def _sha256(parts: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """The config's word for a torch dtype."""
    return next(name for name, value in DTYPES.items() if value == dtype)
