"""Proves an export's tensors against those the trainer gathered from the live engine when it saved the checkpoint.

proof/tensors.json: SHA-256 of every parameter and buffer as gathered, in fp32 and as cast for the export.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from longhaul.artifacts import read_json
from longhaul.convert.layout import ExportedTensor
from longhaul.convert.shards import CHUNK_ELEMENTS, DTYPE_NAMES, chunks, exported_bytes
from longhaul.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
    with ExitStack() as stack:
        places = _open_shards(folder, stack)
        if differing := sorted({tensor.name for tensor in tensors} ^ set(places)):
            raise UserError(f"{differing[0]} is in only one of the written files and the model", NO_EXPORT)
        for source, group in parts.items():
            found = _sha256(data for tensor in group for data in _file_bytes(places[tensor.name], tensor))
            wanted = _expected_sha256(source, group, recorded[source])
            if found != wanted:
                raise UserError(f"exported tensor {source} has SHA-256 {found}, the trained one {wanted}", NO_EXPORT)
    return {"count": len(parts), "equal": len(parts), "files_hold": len(tensors), "dtype": dtype_name(dtype)}


def prove_loading(model: PreTrainedModel, tensors: Sequence[ExportedTensor]) -> dict[str, Any]:
    """Compares every tensor of a model that from_pretrained loaded in the export's dtype with the master weights."""
    state = model.state_dict()
    for tensor in tensors:
        loaded = state[tensor.source].flatten()[tensor.start : tensor.start + tensor.numel]
        if loaded.dtype != tensor.dtype:
            raise UserError(f"from_pretrained gives {tensor.source} as {loaded.dtype}, not {tensor.dtype}", NO_EXPORT)
        for start, stop in chunks(tensor.numel):
            if _raw(loaded[start:stop]) != exported_bytes(tensor, start, stop):
                raise UserError(f"from_pretrained gives {tensor.source} other values than the export holds", NO_EXPORT)
    return {"missing": 0, "unexpected": 0, "mismatched": 0, "equal": len(tensors)}


def _open_shards(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the opened safetensors file that holds it."""
    files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)


def _file_bytes(file: Any, tensor: ExportedTensor) -> Iterable[memoryview]:
    """The tensor's bytes as safetensors reads them, in chunks of whole rows."""
    stored = file.get_slice(tensor.name)
    found, wanted = (stored.get_dtype(), stored.get_shape()), (DTYPE_NAMES[tensor.dtype], list(tensor.shape))
    if found != wanted:
        raise UserError(f"exported tensor {tensor.name} is {found}, not {wanted}", NO_EXPORT)
    rows = max(1, CHUNK_ELEMENTS // max(1, math.prod(tensor.shape[1:])))
    for start, stop in chunks(tensor.shape[0], rows):
        yield _raw(stored[start:stop])


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
    found = _sha256(_raw(master.read_range(start, stop)) for start, stop in chunks(master.numel))
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


def _raw(tensor: torch.Tensor) -> memoryview:
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # pyright: ignore[reportArgumentType]


def dtype_name(dtype: torch.dtype) -> str:
    """The config's word for a torch dtype."""
    return next(name for name, value in DTYPES.items() if value == dtype)
