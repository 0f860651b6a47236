"""Verifies the logits of an export against the trainer's; decides the criterion: bit-equal, or a bound on the difference.

reference/logits.safetensors  input_ids [P, T] int64 and the live engine's logits [P, T, V] fp32
reference/logits.json         device type, thread count, compute data type and torch version of the trainer
P prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from safetensors.torch import load_file
from typing_extensions import TypedDict

from longhaul.artifacts.reference_files import COMPUTED_WITH, LOGITS
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.config.field_types import HuggingFaceConfig
from longhaul.errors import UserError
from longhaul.export.exported_tensors import DTYPES, ExportedTensor, dtype_name
from longhaul.export.fp8_tensors import DTYPE as FP8
from longhaul.export.fp8_tensors import Fp8Matrix
from longhaul.export.layerwise_model import LayerwiseModel, ReadRange
from longhaul.export.tensor_blocks import torch_threads
from longhaul.export.verify_tensors import NO_EXPORT_HINT, open_export
from longhaul.runtime.rank_placement import computes_on_gpus

TF32_EPS = 2.0**-10
"""GPUs may multiply fp32 numbers with a significand of 11 bits."""
PERTURBATIONS = 3
BOUND_MARGIN = 2.0
RELATIVE_BOUND = 1e-5


class Difference(Enum):
    """A reason why equal weights may give other bits here than in the trainer."""

    EXPORT_DTYPE = "the export has fewer bits than the trainer computed with"
    GPU_KERNELS = "kernels of a GPU depend on the alignment of tensors"
    DEVICE = "another kind of device"
    TORCH = "another torch version"
    CPU_CAPABILITY = "another instruction set of the processor"
    SUMS_OVER_RANKS = "the trainer added partial sums of several ranks"
    COMPUTE_DTYPE = "bf16 and fp16 do not round alike in every process"


class Criterion(StrEnum):
    """The condition that the export's logits must satisfy."""

    BIT_EQUALITY = "bit equality"
    RELATIVE_BOUND = "relative bound"
    PERTURBATION_BOUND = "perturbation bound"


class ComputedWith(TypedDict):
    """The content of logits.json."""

    device: str
    threads: int
    dtype: Literal["fp32", "bf16", "fp16"]
    torch: str
    cpu_capability: NotRequired[str | None]
    splits_sums: NotRequired[bool]


@dataclass(frozen=True)
class ReferenceLogits:
    """The trainer's logits [P, T, V] for input_ids [P, T], and the conditions under which it computed them.

    cpu_capability: None where the trainer did not record it
    sums_over_ranks: a parallel layout adds partial sums of several ranks (tensor, expert and sequence parallelism)
    """

    input_ids_PT: torch.Tensor
    logits_PTV: torch.Tensor
    device: str
    threads: int
    compute: torch.dtype
    torch_version: str
    cpu_capability: str | None
    sums_over_ranks: bool


@dataclass(frozen=True)
class WrittenExport:
    """A written export: its folder, the content of its config.json, and the tensors that its files should hold."""

    folder: Path
    config: HuggingFaceConfig
    tensors: Sequence[ExportedTensor]

    def model(self, compute: torch.dtype, device: str = "cpu") -> LayerwiseModel:
        """Return the model with the values in the folder's files."""
        stored = open_export(self.folder)

        def read(tensor: ExportedTensor, start: int, stop: int) -> torch.Tensor:
            values = stored[tensor.name].read_range(start, stop)
            if not isinstance(tensor, Fp8Matrix):
                return values
            return tensor.dequantize(start, values, stored[tensor.factors.name].read())

        return self.model_with(read, compute, device)

    def model_with(self, read: ReadRange, compute: torch.dtype, device: str) -> LayerwiseModel:
        """Return the model with values from another source."""
        return LayerwiseModel(self.config, self.tensors, read, compute, device)


def verify_logits(exported: WrittenExport, reference_folder: Path, dtype: torch.dtype) -> dict[str, object]:
    """Recompute the trainer's logits in the trainer's compute data type, one decoder layer in memory at a time.

    The criterion depends on what differs between the trainer and this process (find_differences, choose_criterion):

    bit equality        nothing that rounds differs.
    relative bound      fp32 throughout, but sums of several ranks, or kernels of a GPU of the same kind, round in another
                        order: RELATIVE_BOUND times the largest logit.
    perturbation bound  everything else: BOUND_MARGIN times the largest change of any logit when every weight moves at
                        random one unit in the last place of the coarsest type involved, up or down (PERTURBATIONS draws,
                        fixed seeds). It is measured on this model, as a mixture of experts may route a token to another
                        expert after the smallest rounding.

    Where only the data type of the export differs, the master weights in the same model must also give equal bits.
    bf16 and fp16 may round differently from process to process on one machine (two runs of one training differ, too), so
    the perturbation bound replaces bit equality where bits differ.

    dtype: data type of the export

    Returns {"bit_equal", "max_abs_difference", "bound", "prompts", "tokens", "criterion", "differences": [text]}, and
    "masters_bit_equal" where the master weights were compared.

    Raises:
        UserError: the logits do not satisfy the criterion.
    """
    reference = read_reference_logits(reference_folder)
    device = reference.device if computes_on_gpus() else "cpu"
    with torch_threads(reference.threads):
        found_PTV = _logits(exported.model(reference.compute, device), reference)
        bit_equal = torch.equal(found_PTV, reference.logits_PTV)
        differences = find_differences(reference, device, dtype, bit_equal)
        criterion = choose_criterion(differences, reference.compute, dtype, bool(torch.backends.cuda.matmul.allow_tf32))
        bounds = _bounds(criterion, differences, exported, reference, device, dtype)
    result = {
        "bit_equal": bit_equal,
        "max_abs_difference": _largest(found_PTV - reference.logits_PTV),
        "bound": 0.0,
        "prompts": reference.logits_PTV.shape[0],
        "tokens": reference.logits_PTV.shape[0] * reference.logits_PTV.shape[1],
        **bounds,
        "criterion": str(criterion),
        "differences": list(differences.values()),
    }
    _require(result, criterion)
    return result


def read_reference_logits(folder: Path) -> ReferenceLogits:
    """Read logits.safetensors and logits.json of the checkpoint's reference values."""
    recorded = read_typed_json(folder / COMPUTED_WITH, ComputedWith, "use another checkpoint")
    tensors = load_file(folder / LOGITS)
    return ReferenceLogits(
        input_ids_PT=tensors["input_ids"],
        logits_PTV=tensors["logits"],
        device=recorded["device"],
        threads=recorded["threads"],
        compute=DTYPES[recorded["dtype"]],
        torch_version=recorded["torch"],
        cpu_capability=recorded.get("cpu_capability"),
        sums_over_ranks=bool(recorded.get("splits_sums")),
    )


def find_differences(
    reference: ReferenceLogits, device: str, dtype: torch.dtype, bit_equal: bool
) -> dict[Difference, str]:
    """Return what may round differently here than in the trainer, each with a description.

    device:    where this process computes
    dtype:     data type of the export
    bit_equal: the export gave the trainer's bits
    """
    found: dict[Difference, str] = {}
    compute = dtype_name(reference.compute)
    if dtype not in (torch.float32, reference.compute):
        found[Difference.EXPORT_DTYPE] = f"exported as {dtype_name(dtype)}, computed in {compute}"
    found |= _machine_differences(reference, device)
    if not found and not bit_equal and reference.compute != torch.float32:
        found[Difference.COMPUTE_DTYPE] = f"computed in {compute}, which does not round alike in every process"
    return found


def _machine_differences(reference: ReferenceLogits, device: str) -> dict[Difference, str]:
    """Return differences of device and software. cuBLAS chooses kernels by the alignment of their operands."""
    if device == reference.device != "cpu":
        return {Difference.GPU_KERNELS: f"computed on {device}, where kernels depend on the alignment of tensors"}
    compared = {
        Difference.DEVICE: ("device", reference.device, device),
        Difference.TORCH: ("torch", reference.torch_version, torch.__version__),
    }
    if device == "cpu" and reference.cpu_capability is not None:
        here = torch.backends.cpu.get_cpu_capability()
        compared[Difference.CPU_CAPABILITY] = ("CPU capability", reference.cpu_capability, here)
    found = {
        difference: f"trained with {name} {trained}, verified with {here}"
        for difference, (name, trained, here) in compared.items()
        if trained != here
    }
    if reference.sums_over_ranks:
        found[Difference.SUMS_OVER_RANKS] = "trained with sums over ranks, verified on one device"
    return found


def choose_criterion(
    differences: Mapping[Difference, str], compute: torch.dtype, dtype: torch.dtype, allow_tf32: bool
) -> Criterion:
    """Return the strictest criterion that correct software satisfies in spite of the differences.

    compute:    data type in which the trainer computed
    dtype:      data type of the export
    allow_tf32: this process may multiply fp32 numbers as TF32 on a GPU; the trainer never does
    """
    if not differences:
        return Criterion.BIT_EQUALITY
    only_sum_order = set(differences) == {Difference.SUMS_OVER_RANKS} or (
        Difference.GPU_KERNELS in differences and not allow_tf32
    )
    if compute == dtype == torch.float32 and only_sum_order:
        return Criterion.RELATIVE_BOUND
    return Criterion.PERTURBATION_BOUND


def _bounds(
    criterion: Criterion,
    differences: Mapping[Difference, str],
    exported: WrittenExport,
    reference: ReferenceLogits,
    device: str,
    dtype: torch.dtype,
) -> dict[str, object]:
    """Return {"bound"} for the criterion, and {"masters_bit_equal"} where the master weights must give equal bits."""
    if criterion is Criterion.BIT_EQUALITY:
        return {}
    if criterion is Criterion.RELATIVE_BOUND:
        return {"bound": RELATIVE_BOUND * _largest(reference.logits_PTV)}

    def logits_with(read: ReadRange) -> torch.Tensor:
        return _logits(exported.model_with(read, reference.compute, device), reference)

    masters_PTV = logits_with(_read_masters)
    result: dict[str, object] = {
        "bound": _perturbation_bound(logits_with, masters_PTV, _coarsest_eps(reference, device, dtype))
    }
    if set(differences) == {Difference.EXPORT_DTYPE}:
        result["masters_bit_equal"] = torch.equal(masters_PTV, reference.logits_PTV)
    return result


def _perturbation_bound(
    logits_with: Callable[[ReadRange], torch.Tensor], masters_PTV: torch.Tensor, eps: float
) -> float:
    draws = range(PERTURBATIONS)
    return BOUND_MARGIN * max(_largest(logits_with(_read_perturbed(eps, draw)) - masters_PTV) for draw in draws)


def _logits(model: LayerwiseModel, reference: ReferenceLogits) -> torch.Tensor:
    """Return the model's logits [P, T, V] of the reference prompts."""
    return torch.cat(model.logits(list(reference.input_ids_PT)))


def _read_masters(tensor: ExportedTensor, start: int, stop: int) -> torch.Tensor:
    return tensor.master.read_range(tensor.start + start, tensor.start + stop)


def _read_perturbed(eps: float, draw: int) -> ReadRange:
    """Return a reader of master weights that moves each one by `eps` of itself, or by a unit of its type, up or down.

    It returns equal values each time it reads the same range.
    """

    def read(tensor: ExportedTensor, start: int, stop: int) -> torch.Tensor:
        values = _read_masters(tensor, start, stop)
        if not values.is_floating_point():
            return values
        digest = hashlib.blake2b(f"{draw}/{tensor.name}/{start}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        signs = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        return values * (1 + max(eps, torch.finfo(tensor.dtype).eps) * signs)

    return read


def _coarsest_eps(reference: ReferenceLogits, device: str, dtype: torch.dtype) -> float:
    """Return the relative unit in the last place of the coarsest type of all weights or of the arithmetic."""
    common = torch.bfloat16 if dtype == FP8 else dtype
    eps = max(torch.finfo(common).eps, torch.finfo(reference.compute).eps)
    return max(eps, TF32_EPS) if {reference.device, device} != {"cpu"} else eps


def _require(result: dict[str, Any], criterion: Criterion) -> None:
    """Raise UserError unless the result satisfies the criterion."""
    if not result.get("masters_bit_equal", True):
        raise UserError(
            "the exported model with the master weights does not give the trained model's logits", NO_EXPORT_HINT
        )
    within_bound = result["max_abs_difference"] <= result["bound"]
    if not (result["bit_equal"] if criterion is Criterion.BIT_EQUALITY else within_bound):
        causes = f" ({'; '.join(result['differences'])})" if result["differences"] else ""
        raise UserError(
            f"logits of the export differ from the trained model's by up to {result['max_abs_difference']:.3g}; "
            f"the limit is {result['bound']:.3g}, the criterion is {criterion}{causes}",
            NO_EXPORT_HINT,
        )


def _largest(values: torch.Tensor) -> float:
    return values.abs().max().item()
