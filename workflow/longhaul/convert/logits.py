"""Proves that the exported model computes what the trained one did, on the trainer's fixed prompts.

proof/logits.safetensors  input_ids [P, T] int64 and the live engine's logits [P, T, V] fp32
proof/logits.json         device type, thread count, compute dtype and torch version they were made with
P prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from longhaul.artifacts import read_json
from longhaul.convert.layout import ExportedTensor
from longhaul.convert.proof import DTYPES, NO_EXPORT, dtype_name
from longhaul.convert.shards import chunks
from longhaul.errors import UserError

TF32_EPS = 2.0**-10  # GPUs may multiply fp32 numbers with a significand of 11 bits
PERTURBATIONS = 3
SPLIT_SUMS = "made with sums over ranks, checked on one device"
BOUND_MARGIN = 2.0
SPLIT_SUMS_RELATIVE = 1e-5


def prove_logits(
    model: PreTrainedModel, tensors: Sequence[ExportedTensor], proof_folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Recomputes the trainer's logits with the exported model, loaded in the trainer's compute dtype.

    Bit equality is asked for when nothing that rounds differs: the export has the trainer's bits after the cast to the
    compute dtype, both were computed on a CPU, and thread count, processor capability and torch version are the trainer's.
    Where only the export's dtype differs, the master weights in the same model must give equal bits, and the export
    itself must stay within a bound; where the machine differs, the export must stay within the bound.
    A layout that sums over ranks (tensor, expert and sequence parallelism) rounds in another order than one device does:
    in fp32 the export must then agree to SPLIT_SUMS_RELATIVE of the largest logit.
    In bf16 and fp16 the same weights on the same machine may round otherwise from process to process (two runs of one
    training differ in their bits, too): where bits differ, the bound holds.

    The bound is measured on this very model, as a mixture of experts may send a token elsewhere after the smallest
    rounding: BOUND_MARGIN times the largest change of any logit when every weight moves at random one unit in the last
    place of the coarsest type involved, up or down (PERTURBATIONS draws, fixed seeds).

    The model's weights are no longer the export's afterwards.

    Raises:
        UserError: the logits differ by more.
    """
    made, recorded = read_json(proof_folder / "logits.json"), load_file(proof_folder / "logits.safetensors")
    input_ids_PT, wanted_PTV = recorded["input_ids"], recorded["logits"]
    device = made["device"] if made["device"] == "cpu" or torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(model, device)
    compute = DTYPES[made["dtype"]]
    rounded, machine = dtype not in (torch.float32, compute), _machine_differences(made, device)
    with _threads(made["threads"]), torch.no_grad():
        found_PTV = prompt_logits(model, input_ids_PT)
        if compute != torch.float32 and not machine and not rounded and not torch.equal(found_PTV, wanted_PTV):
            machine = [f"computed in {made['dtype']}, which does not round alike in every process"]
        result = {
            "bit_equal": torch.equal(found_PTV, wanted_PTV),
            "max_abs_difference": _largest(found_PTV - wanted_PTV),
            "bound": 0.0,
            "prompts": wanted_PTV.shape[0],
            "tokens": wanted_PTV.shape[0] * wanted_PTV.shape[1],
        }
        if rounded and not machine:
            result["masters_bit_equal"] = _masters_give(model, tensors, input_ids_PT, wanted_PTV)
        if machine == [SPLIT_SUMS] and {compute, dtype} == {torch.float32}:
            result["bound"] = SPLIT_SUMS_RELATIVE * _largest(wanted_PTV)
        elif rounded or machine:
            result["bound"] = _bound(model, tensors, input_ids_PT, _coarsest_eps(made, device, dtype))
    because = [f"exported as {dtype_name(dtype)}, computed in {made['dtype']}"] * rounded + machine
    result["asked"] = f"within the bound ({'; '.join(because)})" if because else "bit equality"
    return _judged(result)


def prompt_logits(model: PreTrainedModel, input_ids_PT: torch.Tensor) -> torch.Tensor:
    """Logits [P, T, V] in fp32 on the CPU, one prompt at a time, without padding or cache."""
    device = next(model.parameters()).device
    with torch.no_grad():
        rows = [model(input_ids=row_T[None].to(device), use_cache=False).logits for row_T in input_ids_PT]
    return torch.cat(rows).float().cpu()


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


def _masters_give(
    model: PreTrainedModel, tensors: Sequence[ExportedTensor], input_ids_PT: torch.Tensor, wanted_PTV: torch.Tensor
) -> bool:
    """Puts the master weights in the place of the exported ones and compares the logits."""
    _fill(model, tensors, lambda values: values)
    return torch.equal(prompt_logits(model, input_ids_PT), wanted_PTV)


def _bound(model: PreTrainedModel, tensors: Sequence[ExportedTensor], input_ids_PT: torch.Tensor, eps: float) -> float:
    """BOUND_MARGIN times the largest change of a logit when every master weight moves by a share of `eps`, up or down."""
    before_PTV = prompt_logits(model, input_ids_PT)
    changes = []
    for seed in range(PERTURBATIONS):
        generator = torch.Generator().manual_seed(seed)

        def moved(values: torch.Tensor, generator: torch.Generator = generator) -> torch.Tensor:
            steps = torch.randint(0, 2, values.shape, generator=generator).mul_(2).sub_(1)
            return values * (1 + eps * steps) if values.is_floating_point() else values

        _fill(model, tensors, moved)
        changes.append(_largest(prompt_logits(model, input_ids_PT) - before_PTV))
    return BOUND_MARGIN * max(changes)


def _fill(
    model: PreTrainedModel, tensors: Sequence[ExportedTensor], change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Writes the changed master weights into the model, a chunk at a time."""
    state = model.state_dict()
    for tensor in tensors:
        target = state[tensor.source].view(-1)
        for start, stop in chunks(tensor.numel):
            begin, end = tensor.start + start, tensor.start + stop
            target[begin:end].copy_(change(tensor.master.read_range(begin, end)))


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


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
