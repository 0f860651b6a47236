"""Verifies that from_pretrained loads the export without a warning, and that a small model has the exported values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel

from longhaul.checkpoint_io import raw_bytes
from longhaul.errors import UserError
from longhaul.export.exported_tensors import ExportedTensor
from longhaul.export.fp8_tensors import DTYPE as FP8
from longhaul.export.fp8_tensors import Fp8Matrix
from longhaul.export.tensor_blocks import blocks_of, exported_bytes
from longhaul.export.verify_tensors import NO_EXPORT_HINT

MAX_LOADED_BYTES = 1 << 27
"""Larger exports are not loaded into memory. from_pretrained needs twice this for experts while it fuses them."""


def verify_loading(folder: Path, tensors: list[ExportedTensor], dtype: torch.dtype) -> dict[str, object]:
    """Check that from_pretrained finds every key, and for a small model also that it loads equal values.

    A model of more than MAX_LOADED_BYTES is loaded onto the meta device, which compares only the keys. The values in the
    files are then those that verify_tensors compared.

    Returns {"missing", "unexpected", "mismatched": 0 each, "equal": number of tensors whose values were compared}.

    Raises:
        UserError: transformers finds a key missing, unexpected or of another shape (it would only warn), or it loads a
            tensor with another data type or other values.
    """
    is_small = sum(tensor.size_bytes for tensor in tensors) <= MAX_LOADED_BYTES
    model = _load(folder, dtype, "cpu" if is_small else "meta")
    if is_small:
        _compare_values(model, tensors)
    return {"missing": 0, "unexpected": 0, "mismatched": 0, "equal": len(tensors) if is_small else 0}


def _load(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # nosec B615  # the export
            folder, device_map={"": device}, output_loading_info=True, local_files_only=True, **_precision(dtype)
        )
    except RuntimeError as error:  # from_pretrained raises it for tensors of another shape
        raise UserError(f"from_pretrained cannot load the export: {error}", NO_EXPORT_HINT) from None
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, info[kind])):
            raise UserError(
                f"from_pretrained loads the export with {len(found)} {kind.replace('_', ' ')}: {', '.join(found[:3])}",
                "this transformers release does not read the layout that it writes: use the tested version",
            )
    return model


def _precision(dtype: torch.dtype) -> dict[str, object]:
    """Return the arguments with which from_pretrained loads weights of this data type, on any machine."""
    if dtype != FP8:
        return {"dtype": dtype}
    return {"dtype": torch.bfloat16, "quantization_config": FineGrainedFP8Config(dequantize=True)}


def _compare_values(model: PreTrainedModel, tensors: list[ExportedTensor]) -> None:
    state = model.state_dict()
    for tensor in tensors:
        if not tensor.holds_weights:
            continue
        name = tensor.model_name
        loaded = state[name].flatten()[tensor.start : tensor.start + tensor.numel]
        expected_dtype = torch.bfloat16 if isinstance(tensor, Fp8Matrix) else tensor.dtype
        if loaded.dtype != expected_dtype:
            raise UserError(f"from_pretrained loads {name} as {loaded.dtype}, not {expected_dtype}", NO_EXPORT_HINT)
        for start, stop in blocks_of(tensor):
            if not _are_equal(tensor, start, stop, loaded[start:stop]):
                raise UserError(f"from_pretrained loads {name} with other values than the export holds", NO_EXPORT_HINT)


def _are_equal(tensor: ExportedTensor, start: int, stop: int, loaded: torch.Tensor) -> bool:
    """Return whether the loaded elements are the exported ones; FP8 is dequantized by transformers with a rounding to bf16."""
    if not isinstance(tensor, Fp8Matrix):
        return raw_bytes(loaded) == exported_bytes(tensor, start, stop)
    columns, row = tensor.factors.shape[1], start // tensor.block_elements
    factors = tensor.factors.values(row * columns, (row + 1) * columns).view(1, columns)
    expected = tensor.dequantize(0, tensor.values(start, stop).float(), factors)
    return torch.allclose(loaded.float(), expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)
