"""Verifies each exported tensor by the SHA-256 that the trainer computed from the live engine; largest error of FP8.

reference/tensors.json in the checkpoint holds the SHA-256 of every gathered parameter and buffer, in fp32 and as cast for
the export.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NotRequired

import torch
from safetensors import safe_open
from typing_extensions import TypedDict

from longhaul.artifacts.reference_files import TENSORS
from longhaul.artifacts.typed_json import Sha256, read_typed_json
from longhaul.checkpoint_io import LazyTensor, open_safetensors, raw_bytes
from longhaul.errors import UserError
from longhaul.export.exported_tensors import ExportedTensor, dtype_name
from longhaul.export.fp8_tensors import Fp8Matrix
from longhaul.export.safetensors_writer import SAFETENSORS_NAMES
from longhaul.export.tensor_blocks import HASHING_THREADS, blocks, blocks_of, exported_bytes, torch_threads

_FP32_ROUNDING = 1e-5
"""The factor, the quotient and the product are rounded to fp32."""
NO_EXPORT_HINT = (
    "nothing was exported; the software is at fault, not the config: keep the checkpoint and report this message"
)


class TensorReference(TypedDict):
    """One tensor of tensors.json; aliases: other names of the same tensor."""

    shape: list[int]
    sha256_fp32: Sha256
    sha256_export: Sha256
    aliases: NotRequired[list[str]]


def verify_tensors(
    folder: Path, tensors: Sequence[ExportedTensor], reference: Path, dtype: torch.dtype
) -> dict[str, object]:
    """Read the export back, join the parts of every model tensor and compare its SHA-256 with the trainer's.

    reference: the folder of the checkpoint's reference values

    An FP8 matrix is also dequantized, and every element is compared with its master weight.

    Returns {"count", "equal": number of model tensors, "files_hold": number of tensors in the files, "dtype"}, and
    "largest_fp8_error" where there are FP8 matrices, as a multiple of what rounding to FP8 allows.

    Raises:
        UserError: a tensor is missing, additional, of another shape or data type, has other bytes, or differs by more than
            rounding to FP8 allows.
    """
    trained = read_typed_json(reference / TENSORS, dict[str, TensorReference], NO_EXPORT_HINT)
    # A head that the trainer ties to the embedding may be in the files as a copy.
    recorded = trained | {alias: entry for entry in trained.values() for alias in entry.get("aliases", ())}
    parts = {name: list(group) for name, group in groupby(tensors, key=lambda tensor: tensor.model_name)}
    if differing := sorted((set(parts) - set(recorded)) | (set(trained) - set(parts))):
        raise UserError(f"{differing[0]} is in only one of the export and the reference values", NO_EXPORT_HINT)
    stored = open_export(folder)
    if differing := sorted({tensor.name for tensor in tensors} ^ set(stored)):
        raise UserError(f"{differing[0]} is in only one of the written files and the model", NO_EXPORT_HINT)

    def verify(name: str) -> float:
        found = _sha256(data for tensor in parts[name] for data in _file_bytes(stored[tensor.name], tensor))
        expected = _expected_sha256(name, parts[name], recorded[name])
        if found != expected:
            raise UserError(f"exported tensor {name} has SHA-256 {found}, the trained one {expected}", NO_EXPORT_HINT)
        return max((_fp8_error(tensor, stored) for tensor in parts[name] if isinstance(tensor, Fp8Matrix)), default=0.0)

    with torch_threads(1), ThreadPoolExecutor(HASHING_THREADS) as pool:
        largest_error = max(pool.map(verify, parts))
    result: dict[str, object] = {
        "count": len(parts),
        "equal": len(parts),
        "files_hold": len(tensors),
        "dtype": dtype_name(dtype),
    }
    return result | ({"largest_fp8_error": largest_error} if largest_error else {})


def open_export(folder: Path) -> dict[str, LazyTensor]:
    """Return name -> tensor of all safetensors files in the folder.

    Raises:
        UserError: two files hold the same name, or the safetensors library reads other names, types or shapes.
    """
    found: dict[str, LazyTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        opened = open_safetensors(path)
        if duplicates := sorted(set(opened) & set(found)):
            raise UserError(f"two files of the export hold {duplicates[0]}", NO_EXPORT_HINT)
        with safe_open(path, "pt") as official:
            slices = {name: official.get_slice(name) for name in official.keys()}  # noqa: SIM118 (not a dict)
            read = {name: (stored.get_dtype(), stored.get_shape()) for name, stored in slices.items()}
        expected = {
            name: (SAFETENSORS_NAMES[tensor.pieces[0].dtype], list(tensor.shape)) for name, tensor in opened.items()
        }
        if read != expected:
            raise UserError(
                f"the safetensors library reads other tensors from {path.name} than were written", NO_EXPORT_HINT
            )
        found |= opened
    return found


def _fp8_error(matrix: Fp8Matrix, stored: dict[str, LazyTensor]) -> float:
    """Return the matrix's largest error as a multiple of what rounding to FP8 allows; UserError if it is above 1."""
    factors, values = stored[matrix.factors.name].read(), stored[matrix.name]
    largest = 0.0
    for start, stop in blocks_of(matrix):
        found = matrix.dequantize(start, values.read_range(start, stop), factors)
        largest = max(largest, matrix.largest_error(start, found, factors))
    if not largest <= 1 + _FP32_ROUNDING:
        raise UserError(
            f"exported tensor {matrix.name} differs from the trained one by {largest:.3g} times what FP8 allows",
            NO_EXPORT_HINT,
        )
    return largest


def _file_bytes(stored: LazyTensor, tensor: ExportedTensor) -> Iterator[memoryview]:
    """Yield the tensor's bytes as the file holds them."""
    piece = stored.pieces[0]
    if (piece.dtype, stored.shape) != (tensor.dtype, tensor.shape):
        raise UserError(
            f"exported tensor {tensor.name} is {piece.dtype} {list(stored.shape)}, "
            f"not {tensor.dtype} {list(tensor.shape)}",
            NO_EXPORT_HINT,
        )
    for start, stop in blocks_of(tensor):
        yield raw_bytes(piece.part(start, stop).read())


def _expected_sha256(name: str, parts: list[ExportedTensor], entry: TensorReference) -> str:
    """Return the hash that the exported bytes of a model tensor should have.

    The trainer hashed the cast to the stage's export dtype. A stage may be exported in another dtype than it was trained
    for, and the trainer does not round to FP8. Then this function compares the fp32 master weights with the trainer's hash,
    and hashes what follows from them.
    """
    if parts[0].dtype == torch.float32:
        return entry["sha256_fp32"]
    if entry["sha256_export"] != entry["sha256_fp32"] and not isinstance(parts[0], Fp8Matrix):
        return entry["sha256_export"]
    master = parts[0].master
    found = _sha256(raw_bytes(master.read_range(start, stop)) for start, stop in blocks(master.numel))
    if found != entry["sha256_fp32"]:
        raise UserError(
            f"master weights of {name} have SHA-256 {found}, the trained ones {entry['sha256_fp32']}", NO_EXPORT_HINT
        )
    return _sha256(exported_bytes(tensor, start, stop) for tensor in parts for start, stop in blocks_of(tensor))


def _sha256(parts: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
