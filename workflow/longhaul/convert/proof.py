"""Proves an export against what the trainer recorded from the live engine when it saved the checkpoint.

proof/tensors.json       SHA-256 of every parameter and buffer as gathered from the engine, in fp32 and as cast for the export
proof/logits.safetensors input_ids [P, T] int64 and the engine's logits [P, T, V] fp32; P prompts, T tokens, V vocabulary
proof/logits.json        device type, thread count, compute dtype and torch version of those logits
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from longhaul.artifacts import read_json
from longhaul.convert.layout import ExportedTensor
from longhaul.convert.shards import CHUNK_ELEMENTS, DTYPE_NAMES, chunks, exported_bytes
from longhaul.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest relative error of one rounding: half a unit in the last place of the significand.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TF32_ROUNDING = 2.0**-11  # GPUs may multiply fp32 with a significand of 11 bits
ROUNDING_MARGIN = 8.0
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
    recorded = _recorded(proof_folder / "tensors.json")
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
    return {"count": len(parts), "equal": len(parts), "files_hold": len(tensors), "dtype": _short(dtype)}


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


def prove_logits(model: PreTrainedModel, proof_folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Recomputes the trainer's logits with the exported model, which was loaded in the trainer's compute dtype.

    Bit equality is asked for when nothing that rounds differs: the weights have the same bits after the cast to the
    compute dtype, and device type, thread count and torch version are the trainer's. Otherwise the largest difference
    may be `ROUNDING_MARGIN * u * sqrt(2 L + 2)` times the largest logit: each of the 2 L residual additions, the
    embedding and the head adds an independent relative error of about the rounding unit u of the coarsest type involved.

    Raises:
        UserError: the logits differ by more.
    """
    made = read_json(proof_folder / "logits.json")
    recorded = load_file(proof_folder / "logits.safetensors")
    device = made["device"] if made["device"] != "cuda" or torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(model, device)
    with _threads(made["threads"]):
        logits_PTV = prompt_logits(model, recorded["input_ids"])
    wanted_PTV = recorded["logits"]
    differences = _what_differs(made, device, dtype)
    bound = _bound(model, made, device, dtype, wanted_PTV) if differences else 0.0
    difference = (logits_PTV - wanted_PTV).abs().max().item()
    result = {
        "bit_equal": torch.equal(logits_PTV, wanted_PTV),
        "max_abs_difference": difference,
        "bound": bound,
        "asked": f"within the bound: {', '.join(differences)}" if differences else "bit equality",
        "prompts": wanted_PTV.shape[0],
        "tokens": wanted_PTV.shape[0] * wanted_PTV.shape[1],
    }
    if not (difference <= bound if differences else result["bit_equal"]):
        raise UserError(
            f"logits of the export differ from the trained model's by up to {difference:.3g}, the limit is {bound:.3g} "
            f"({result['asked']})",
            NO_EXPORT,
        )
    return result


def prompt_logits(model: PreTrainedModel, input_ids_PT: torch.Tensor) -> torch.Tensor:
    """Logits [P, T, V] in fp32 on the CPU, one prompt at a time, without padding or cache."""
    device = next(model.parameters()).device
    with torch.no_grad():
        rows = [model(input_ids=row_T[None].to(device), use_cache=False).logits for row_T in input_ids_PT]
    return torch.cat(rows).float().cpu()


def compute_dtype(proof_folder: Path) -> torch.dtype:
    """The type the trainer computed its logits in."""
    return DTYPES[read_json(proof_folder / "logits.json")["dtype"]]


def _recorded(path: Path) -> dict[str, dict[str, Any]]:
    return read_json(path)


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


def _what_differs(made: dict[str, Any], device: str, dtype: torch.dtype) -> list[str]:
    """What makes rounding differ between the trainer's logits and ours, in words."""
    compute = DTYPES[made["dtype"]]
    reasons = []
    if dtype not in (torch.float32, compute):
        reasons.append(f"weights exported as {_short(dtype)}, computed in {made['dtype']}")
    if device != made["device"]:
        reasons.append(f"computed on {made['device']}, checked on {device}")
    if (cpu := torch.backends.cpu.get_cpu_capability()) != made.get("cpu_capability", cpu):
        reasons.append(f"computed with {made['cpu_capability']}, checked with {cpu}")
    if torch.__version__ != made["torch"]:
        reasons.append(f"computed by torch {made['torch']}, checked by {torch.__version__}")
    return reasons


def _bound(
    model: PreTrainedModel, made: dict[str, Any], device: str, dtype: torch.dtype, wanted_PTV: torch.Tensor
) -> float:
    rounding = max(ROUNDING[DTYPES[made["dtype"]]], ROUNDING[dtype])
    if "cuda" in (made["device"], device):
        rounding = max(rounding, TF32_ROUNDING)
    roundings = 2 * model.config.get_text_config().num_hidden_layers + 2
    return ROUNDING_MARGIN * rounding * math.sqrt(roundings) * wanted_PTV.abs().max().item()


def _short(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


@contextmanager
def _threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
