"""Which tensors an export holds: the names, shapes and types of the Hugging Face hub, cut from the model's own.

Experts are stored one by one (config/stored_weights.py); each is one contiguous range of the model's own tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from longhaul.checkpoint_io import LazyTensor
from longhaul.config.pretrained_format import expert_keys
from longhaul.errors import UserError

KNOWN_MODELS = "export a Llama, Qwen2, Qwen3, Qwen3-MoE, DeepSeek V2 or DeepSeek V3 model"
NOT_THE_MODEL = "the checkpoint and model_config.json belong to different models: train the stage again"


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of the export: elements [start, start + numel) of the model's tensor `source`, cast to `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    master: LazyTensor
    start: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def meta_model(config: dict[str, Any]) -> PreTrainedModel:
    """The model of a Hugging Face config, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hugging_face_config(config))


def hugging_face_config(config: dict[str, Any]) -> PreTrainedConfig:
    """The config object of a config.json's content."""
    keys = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version", "dtype")}
    if config["model_type"] not in CONFIG_MAPPING:
        raise UserError(f"model_type {config['model_type']} is not known to transformers", KNOWN_MODELS)
    return AutoConfig.for_model(config["model_type"], **keys)


def export_layout(
    model: PreTrainedModel, masters: Mapping[str, LazyTensor], dtype: torch.dtype
) -> tuple[ExportedTensor, ...]:
    """Every tensor of the export, in the model's order.

    Raises:
        UserError: a tensor is missing, left over, of another shape, or its layout on the hub is not known here.
    """
    state = model.state_dict()
    untied = remove_tied_weights_from_state_dict(dict(state), model)
    sources = _match(set(state), list(untied), masters)
    tensors: list[ExportedTensor] = []
    for name, meta in untied.items():
        if sources[name].shape != tuple(meta.shape):
            found, wanted = list(sources[name].shape), list(meta.shape)
            raise UserError(f"{name} has shape {found} in the checkpoint, but {wanted} in the model", NOT_THE_MODEL)
        tensors += _cut(name, sources[name], target_dtype(model, name, sources[name], dtype))
    _check_against_transformers(model, untied, tensors)
    return tuple(tensors)


def _match(names: set[str], untied: list[str], masters: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The master of each exported name; every name of the model has exactly one, and none is left over."""
    found = {name: master for first, master in masters.items() for name in (first, *master.aliases)}
    if missing := sorted(names - set(found)):
        raise UserError(f"the checkpoint lacks {missing[0]} and {len(missing) - 1} more of the model", NOT_THE_MODEL)
    if extra := sorted(set(found) - names):
        raise UserError(
            f"the checkpoint holds {extra[0]} and {len(extra) - 1} more that the model lacks", NOT_THE_MODEL
        )
    if len(untied) != len(masters):
        tied = sorted(names - set(untied)) or sorted(alias for master in masters.values() for alias in master.aliases)
        raise UserError(f"the checkpoint and the config disagree on whether {tied[0]} is tied", NOT_THE_MODEL)
    return {name: found[name] for name in untied}


def target_dtype(model: PreTrainedModel, name: str, master: LazyTensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but fp32 for what transformers keeps in fp32, and integers as they are."""
    if not master.dtype.is_floating_point:
        return master.dtype
    kept = model._keep_in_fp32_modules_strict or ()
    return torch.float32 if any(part in name for part in kept) else dtype


def _cut(name: str, master: LazyTensor, dtype: torch.dtype) -> Iterator[ExportedTensor]:
    keys = expert_keys(name, master.shape)
    if not keys:
        yield ExportedTensor(name, master.shape, dtype, name, master)
        return
    experts, rows, columns = master.shape
    shape = (experts * rows // len(keys), columns)
    for index, key in enumerate(keys):
        yield ExportedTensor(key, shape, dtype, name, master, index * math.prod(shape))


def _check_against_transformers(
    model: PreTrainedModel, untied: dict[str, torch.Tensor], tensors: list[ExportedTensor]
) -> None:
    """Names and shapes must be those that save_pretrained would write for this architecture."""
    official = {name: tuple(meta.shape) for name, meta in revert_weight_conversion(model, untied).items()}
    if official != {tensor.name: tensor.shape for tensor in tensors}:
        raise UserError(
            f"the hub layout of model_type {model.config.model_type} is not known to this exporter",
            KNOWN_MODELS,
        )
