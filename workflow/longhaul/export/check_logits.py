"""Proves that the exported model computes what the trained one did, on the trainer's fixed prompts.

proof/logits.safetensors  input_ids [P, T] int64 and the live engine's logits [P, T, V] fp32
proof/logits.json         device type, thread count, compute dtype and torch version they were made with
P prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from longhaul.artifacts.files import read_json
from longhaul.errors import UserError
from longhaul.export.check_tensors import DTYPES, NO_EXPORT, dtype_name, open_export
from longhaul.export.layerwise_model import Read, StreamedModel
from longhaul.export.tensor_layout import ExportedTensor
from longhaul.export.torch_threads import torch_threads

TF32_EPS = 2.0**-10  # GPUs may multiply fp32 numbers with a significand of 11 bits
PERTURBATIONS = 3
SPLIT_SUMS = "made with sums over ranks, checked on one device"
BOUND_MARGIN = 2.0
SPLIT_SUMS_RELATIVE = 1e-5


@dataclass(frozen=True)
class Exported:
    """A written export: its folder, the content of its config.json, and what its files should hold."""

    folder: Path
    config: dict[str, Any]
    tensors: Sequence[ExportedTensor]

    def model(self, compute: torch.dtype, device: str = "cpu") -> StreamedModel:
        """The model of the folder's files."""
        stored = open_export(self.folder)
        return self.model_of(lambda tensor, start, stop: stored[tensor.name].read_range(start, stop), compute, device)

    def model_of(self, read: Read, compute: torch.dtype, device: str) -> StreamedModel:
        """The model of other values."""
        return StreamedModel(self.config, self.tensors, read, compute, device)


def prove_logits(exported: Exported, proof_folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Recomputes the trainer's logits in the trainer's compute dtype, with one decoder layer of the export in memory.

    Bit equality is asked for when nothing that rounds differs: the export has the trainer's bits after the cast to the
    compute dtype, both were computed on a CPU, and thread count, processor capability and torch version are the trainer's.
    Where only the export's dtype differs, the master weights in the same model must give equal bits, and the export
    itself must stay within a bound; where the machine differs, the export must stay within the bound.
    A layout that sums over ranks (tensor, expert and sequence parallelism) rounds in another order than one device does,
    and so may kernels of the same GPU: in fp32 the export must then agree to SPLIT_SUMS_RELATIVE of the largest logit.
    In bf16 and fp16 the same weights on the same machine may round otherwise from process to process (two runs of one
    training differ in their bits, too): where bits differ, the bound holds.

    The bound is measured on this very model, as a mixture of experts may send a token elsewhere after the smallest
    rounding: BOUND_MARGIN times the largest change of any logit when every weight moves at random one unit in the last
    place of the coarsest type involved, up or down (PERTURBATIONS draws, fixed seeds).

    Raises:
        UserError: the logits differ by more.
    """
    made, recorded = read_json(proof_folder / "logits.json"), load_file(proof_folder / "logits.safetensors")
    input_ids_PT, wanted_PTV = recorded["input_ids"], recorded["logits"]
    device = made["device"] if made["device"] == "cpu" or torch.cuda.is_available() else "cpu"
    compute = DTYPES[made["dtype"]]
    rounded, machine = dtype not in (torch.float32, compute), _machine_differences(made, device)

    def logits_of(model: StreamedModel) -> torch.Tensor:
        return torch.cat(model.logits(list(input_ids_PT)))

    def logits_with(read: Read) -> torch.Tensor:
        return logits_of(exported.model_of(read, compute, device))

    with torch_threads(made["threads"]):
        found_PTV = logits_of(exported.model(compute, device))
        if compute != torch.float32 and not machine and not rounded and not torch.equal(found_PTV, wanted_PTV):
            machine = [f"computed in {made['dtype']}, which does not round alike in every process"]
        result = {
            "bit_equal": torch.equal(found_PTV, wanted_PTV),
            "max_abs_difference": _largest(found_PTV - wanted_PTV),
            "bound": 0.0,
            "prompts": wanted_PTV.shape[0],
            "tokens": wanted_PTV.shape[0] * wanted_PTV.shape[1],
        }
        if {compute, dtype} == {torch.float32} and (
            machine == [SPLIT_SUMS] or (machine and _is_on_its_gpu(made, device))
        ):
            result["bound"] = SPLIT_SUMS_RELATIVE * _largest(wanted_PTV)
        elif rounded or machine:
            masters_PTV = logits_with(_master_values)
            if rounded and not machine:
                result["masters_bit_equal"] = torch.equal(masters_PTV, wanted_PTV)
            eps = _coarsest_eps(made, device, dtype)
            changes = [_largest(logits_with(_moved(eps, draw)) - masters_PTV) for draw in range(PERTURBATIONS)]
            result["bound"] = BOUND_MARGIN * max(changes)
    because = [f"exported as {dtype_name(dtype)}, computed in {made['dtype']}"] * rounded + machine
    result["asked"] = f"within the bound ({'; '.join(because)})" if because else "bit equality"
    return _judged(result)


def compute_dtype(proof_folder: Path) -> torch.dtype:
    """The type the trainer computed its logits in."""
    return DTYPES[read_json(proof_folder / "logits.json")["dtype"]]


def _machine_differences(made: dict[str, Any], device: str) -> list[str]:
    """What makes the same weights round differently here, in words; cuBLAS chooses kernels by where its operands lie."""
    if device == made["device"] != "cpu":
        return [f"computed on {device}, where kernels depend on the alignment of tensors"]
    here = {"device": device, "torch": torch.__version__}
    if device == "cpu":
        here["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    found = [
        f"made with {key} {made[key]}, checked with {value}"
        for key, value in here.items()
        if key in made and made[key] != value
    ]
    return [*found, SPLIT_SUMS] if made.get("splits_sums") else found


def _master_values(tensor: ExportedTensor, start: int, stop: int) -> torch.Tensor:
    return tensor.master.read_range(tensor.start + start, tensor.start + stop)


def _moved(eps: float, draw: int) -> Read:
    """The master weights, each moved by a share of `eps` of itself, up or down; alike whenever a range is read again."""

    def read(tensor: ExportedTensor, start: int, stop: int) -> torch.Tensor:
        values = _master_values(tensor, start, stop)
        if not values.is_floating_point():
            return values
        digest = hashlib.blake2b(f"{draw}/{tensor.name}/{start}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        steps = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        return values * (1 + eps * steps)

    return read


def _is_on_its_gpu(made: dict[str, Any], device: str) -> bool:
    """The same kind of device multiplies fp32 as the trainer's did, which leaves torch's default: no TF32."""
    return device == made["device"] != "cpu" and not torch.backends.cuda.matmul.allow_tf32


def _coarsest_eps(made: dict[str, Any], device: str, dtype: torch.dtype) -> float:
    """Unit in the last place, relative, of the coarsest type of weights or arithmetic."""
    eps = max(torch.finfo(dtype).eps, torch.finfo(DTYPES[made["dtype"]]).eps)
    return max(eps, TF32_EPS) if {made["device"], device} != {"cpu"} else eps


def _judged(result: dict[str, Any]) -> dict[str, Any]:
    if not result.get("masters_bit_equal", True):
        raise UserError("the master weights in the exported model do not give the trained model's logits", NO_EXPORT)
    within = (
        result["bit_equal"] if result["asked"] == "bit equality" else result["max_abs_difference"] <= result["bound"]
    )
    if not within:
        raise UserError(
            f"logits of the export differ from the trained model's by up to {result['max_abs_difference']:.3g}, "
            f"the limit is {result['bound']:.3g}: {result['asked']} was asked for",
            NO_EXPORT,
        )
    return result


def _largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()
