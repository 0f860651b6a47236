"""Reads an export the way its users will, and takes transformers' warnings for errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from longhaul.checkpoint_io import raw_bytes
from longhaul.errors import UserError
from longhaul.export.check_tensors import NO_EXPORT
from longhaul.export.safetensors_writer import chunks, exported_bytes
from longhaul.export.tensor_layout import ExportedTensor

# Weights that are loaded whole, experts twice while they are fused, stay well below what a conversion may use.
WHOLE_BYTES = 1 << 27


def prove_loading(folder: Path, tensors: list[ExportedTensor], dtype: torch.dtype) -> dict[str, Any]:
    """from_pretrained finds every key in its place; in a small model, the values too.

    `equal` counts the tensors whose values were compared. In a larger model from_pretrained is given no memory: the keys are
    compared, and the values are those that the proof of the tensors read from the files.

    Raises:
        UserError: transformers finds a key missing, unexpected or of another shape (it would only warn and go on), or
            gives a tensor another type or other values.
    """
    small = sum(tensor.size_bytes for tensor in tensors) <= WHOLE_BYTES
    model = _load(folder, dtype, "cpu" if small else "meta")
    if small:
        _compare(model, tensors)
    return {"missing": 0, "unexpected": 0, "mismatched": 0, "equal": len(tensors) if small else 0}


def _load(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, output_loading_info=True, local_files_only=True
        )
    except RuntimeError as error:  # what it raises for tensors of another shape
        raise UserError(f"from_pretrained on the export: {error}", NO_EXPORT) from None
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, info[kind])):
            raise UserError(
                f"from_pretrained on the export: {kind.replace('_', ' ')}: {', '.join(found[:3])} ({len(found)} in all)",
                "this transformers release reads another layout than it writes: use the tested version",
            )
    return model


def _compare(model: PreTrainedModel, tensors: list[ExportedTensor]) -> None:
    state = model.state_dict()
    for tensor in tensors:
        loaded = state[tensor.source].flatten()[tensor.start : tensor.start + tensor.numel]
        if loaded.dtype != tensor.dtype:
            raise UserError(f"from_pretrained gives {tensor.source} as {loaded.dtype}, not {tensor.dtype}", NO_EXPORT)
        for start, stop in chunks(tensor.numel):
            if raw_bytes(loaded[start:stop]) != exported_bytes(tensor, start, stop):
                raise UserError(f"from_pretrained gives {tensor.source} other values than the export holds", NO_EXPORT)
