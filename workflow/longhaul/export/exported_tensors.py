"""Lists the tensors of an export: hub names, shapes, dtype (export_dtype, fp32 exceptions), one tensor per expert.

The hub stores one tensor per expert (see config/pretrained_format.py). In the model, one tensor holds all experts of a layer.
Each exported expert is one contiguous range of that tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from longhaul.checkpoint_io import LazyTensor
from longhaul.compat.transformers import hub_tensors, is_kept_in_fp32, without_tied_weights
from longhaul.config.pretrained_format import expert_keys
from longhaul.errors import InputError, UserError
from longhaul.export.model_without_memory import SUPPORTED_MODELS_HINT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
"""The config's name of a data type -> torch's data type."""
BLOCK_ELEMENTS = 1 << 20
"""4 MiB of fp32: a block stays in the processor's cache from reading to writing."""
WRONG_MODEL_HINT = "the checkpoint and model_config.json belong to different models: train the stage again"


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of the export: elements [start, start + numel) of the model's tensor `model_name`, cast to `dtype`.

    name:   name in the export's files
    master: the model's whole tensor as master weights
    """

    holds_weights: ClassVar[bool] = True
    """False for a tensor that the model itself lacks."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    model_name: str
    master: LazyTensor
    start: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def block_elements(self) -> int:
        """Number of elements that are read and written at once."""
        return BLOCK_ELEMENTS

    def values(self, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop) as the file should hold them."""
        return self.master.read_range(self.start + start, self.start + stop).to(self.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the config's name of a torch data type."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def list_exported_tensors(
    trained: PreTrainedModel, exported: PreTrainedModel, masters: Mapping[str, LazyTensor], dtype: torch.dtype
) -> tuple[ExportedTensor, ...]:
    """Return every tensor of the export, in the model's order.

    trained:  the model of the checkpoint
    exported: the same model; a tied head of `trained` may be a tensor of its own in it
    masters:  name in the trained model -> master weights
    dtype:    data type of the export

    Raises:
        UserError: the checkpoint lacks a tensor of the model, holds an additional one or one of another shape, or this
            module does not know how the hub stores the model's tensors.
    """
    matched = _match_masters(trained, masters)
    stored = without_tied_weights(exported, exported.state_dict())
    tensors: list[ExportedTensor] = []
    for name, meta in stored.items():
        master = matched[name]
        if master.shape != tuple(meta.shape):
            found, expected = list(master.shape), list(meta.shape)
            raise UserError(
                f"{name} has shape {found} in the checkpoint, but {expected} in the model", WRONG_MODEL_HINT
            )
        tensors += _split_experts(name, master, target_dtype(exported, name, master, dtype))
    _compare_with_transformers(exported, stored, tensors)
    return tuple(tensors)


def _match_masters(trained: PreTrainedModel, masters: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the master weights of each name of the model. Each must have exactly one, and none is left."""
    state = trained.state_dict()
    names, untied = set(state), without_tied_weights(trained, state)
    found = {name: master for first, master in masters.items() for name in (first, *master.aliases)}
    if missing := sorted(names - set(found)):
        raise UserError(
            f"the checkpoint lacks {len(missing)} tensors of the model, the first is {missing[0]}", WRONG_MODEL_HINT
        )
    if extra := sorted(set(found) - names):
        raise UserError(
            f"the checkpoint holds {len(extra)} tensors that the model lacks, the first is {extra[0]}", WRONG_MODEL_HINT
        )
    if len(untied) != len(masters):
        tied = sorted(names - set(untied)) or sorted(alias for master in masters.values() for alias in master.aliases)
        raise UserError(f"{tied[0]} is tied in only one of the checkpoint and the model's config", WRONG_MODEL_HINT)
    return found


def target_dtype(model: PreTrainedModel, name: str, master: LazyTensor, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, but fp32 for tensors that transformers keeps in fp32, and the own type of integer tensors."""
    if not master.dtype.is_floating_point:
        return master.dtype
    return torch.float32 if is_kept_in_fp32(model, name) else dtype


def _split_experts(name: str, master: LazyTensor, dtype: torch.dtype) -> Iterator[ExportedTensor]:
    """Yield one tensor per expert, or the whole tensor where it holds no experts."""
    keys = expert_keys(name, master.shape)
    if not keys:
        yield ExportedTensor(name, master.shape, dtype, name, master)
        return
    experts, rows, columns = master.shape
    shape = (experts * rows // len(keys), columns)
    for index, key in enumerate(keys):
        yield ExportedTensor(key, shape, dtype, name, master, index * math.prod(shape))


def _compare_with_transformers(
    model: PreTrainedModel, stored: dict[str, torch.Tensor], tensors: list[ExportedTensor]
) -> None:
    """Raise UserError unless names and shapes are those that save_pretrained would write for this architecture."""
    official = {name: tuple(meta.shape) for name, meta in hub_tensors(model, stored).items()}
    if official != {tensor.name: tensor.shape for tensor in tensors}:
        raise InputError(
            f"this exporter does not know how the hub stores the tensors of model_type {model.config.model_type}",
            SUPPORTED_MODELS_HINT,
        )
