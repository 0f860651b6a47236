"""Reads what a served model is compared with: the trainer's log probabilities, and the export's greedy completions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Export
from longhaul.artifacts.atomic_files import file_blake3, file_sha256
from longhaul.artifacts.compare_hashes import wrong_files
from longhaul.artifacts.reference_files import COMPUTED_WITH, LOGITS, PROMPTS
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.config.field_types import Precision
from longhaul.config.safetensors_header import safetensors_header
from longhaul.errors import UserError
from longhaul.train.checkpoint.checkpoint_folders import MANIFEST, read_manifest, reference_folder

_HINT = "restore the checkpoint's files, or train and export the stage again"


class _ComputedWith(TypedDict, total=False):
    """The part of logits.json that matters here."""

    __pydantic_config__ = {"extra": "allow"}  # pyright: ignore[reportGeneralTypeIssues]  # noqa: RUF012

    dtype: Precision


class _SamplePrompts(TypedDict):
    split: str
    input_ids: list[list[int]]


@dataclass(frozen=True)
class ReferenceValues:
    """P prompts of T tokens.

    prompts_PT:         token ids
    log_probabilities_PT: the trainer's, of each prompt's second and all later tokens [P, T - 1]
    compute:            data type in which the trainer computed
    sample_ids:         token ids of the prompts of the export's samples
    """

    prompts_PT: list[list[int]]
    log_probabilities_PT: np.ndarray
    compute: Precision
    sample_ids: list[list[int]]


def read_reference_values(export: Export) -> ReferenceValues:
    """Read the reference values of the checkpoint that was exported, after a check of their recorded hashes.

    Raises:
        UserError: a file is missing or was altered.
    """
    checkpoint = Path(export.checkpoint)
    folder = reference_folder(checkpoint)
    _verify(checkpoint, folder, export)
    tensors = _read_tensors(folder / LOGITS)
    samples = read_typed_json(folder / PROMPTS, _SamplePrompts, _HINT)
    computed = read_typed_json(folder / COMPUTED_WITH, _ComputedWith, _HINT)
    ids_PT = tensors["input_ids"]
    return ReferenceValues(
        prompts_PT=ids_PT.tolist(),
        log_probabilities_PT=log_probabilities(ids_PT, tensors["logits"]),
        compute=computed.get("dtype", "bf16"),
        sample_ids=samples["input_ids"],
    )


def log_probabilities(ids_PT: np.ndarray, logits_PTV: np.ndarray) -> np.ndarray:
    """Return the log probabilities [P, T - 1] of each prompt's second and all later tokens, computed in fp64."""
    logits = logits_PTV[:, :-1].astype(np.float64)
    largest = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(-1)) + largest[..., 0]
    return np.take_along_axis(logits, ids_PT[:, 1:, None], -1)[..., 0] - total


def _verify(checkpoint: Path, folder: Path, export: Export) -> None:
    manifest = checkpoint / MANIFEST
    if not manifest.exists() or file_sha256(manifest) != export.provenance.get("checkpoint_sha256"):
        raise UserError(f"{manifest} is not the manifest of the checkpoint that {export.path} was exported from", _HINT)
    recorded = read_manifest(checkpoint)["files"]
    files = {
        checkpoint / name: entry["blake3"] for name, entry in recorded.items() if (checkpoint / name).parent == folder
    }
    if problem := next(wrong_files(files, file_blake3), None):
        raise UserError(problem, _HINT)


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a small safetensors file of int64 and fp32 tensors without torch, which the controller environment has not."""
    header, start = safetensors_header(path)
    types = {"I64": "<i8", "F32": "<f4"}
    data = path.read_bytes()[start:]
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], types[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
