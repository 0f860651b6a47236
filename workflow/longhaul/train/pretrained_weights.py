"""Reads initial weights from a Hugging Face folder: checks keys and shapes, joins experts, dequantizes FP8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longhaul.artifacts.atomic_files import read_json
from longhaul.checkpoint_io import LazyTensor, open_safetensors
from longhaul.checkpoint_io.tensor_slice import TensorSlice
from longhaul.config.hub_tensors import TWO_FILES_HINT, WRONG_WEIGHTS_HINT, check_names, check_shape
from longhaul.config.pretrained_format import DAMAGED_PRETRAINED_HINT, expert_keys, fp8_block_shape, mtp_prefixes
from longhaul.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SCALE = "_scale_inv"


@dataclass(frozen=True)
class BlockScaledTensor:
    """A float8_e4m3fn matrix with one factor per block; reads like a LazyTensor, as fp32.

    weight [M, N], scale [ceil(M / rows), ceil(N / columns)] fp32, block (rows, columns).
    An element is its FP8 value times its block's factor: weight_dequant of DeepSeek-V3's inference/kernel.py.
    """

    weight: LazyTensor
    scale: LazyTensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self) -> torch.Tensor:
        values_MN, scale = self.weight.read(), self.scale.read()
        rows, columns = self.block
        for index, factors in enumerate(scale):
            column_factors_N = factors.repeat_interleave(columns)[: values_MN.shape[1]]
            values_MN[index * rows : (index + 1) * rows].mul_(column_factors_N)
        return values_MN


StoredWeights = dict[str, LazyTensor | BlockScaledTensor]
"""Name in the folder -> tensor that reads as fp32."""


def pretrained_values(
    folder: Path, shapes: dict[str, tuple[int, ...]], config: PreTrainedConfig
) -> Callable[[TensorSlice], torch.Tensor]:
    """Return a function that reads a slice of a tensor of the model from safetensors.

    shapes: name -> shape of all tensors of the model, as transformers has them; the folder holds experts one by one.
    config: the model's. The folder's own config.json describes how its weights are stored.

    Raises:
        UserError: a tensor is missing, left over, or of another shape or type. Multi-token prediction layers, which DeepSeek's
            folders hold after the last decoder layer, are no error: they are not read.
    """
    stored = _open_weights(folder)
    keys = {name: expert_keys(name, shape) or [name] for name, shape in shapes.items()}
    check_names(folder, stored, {key for found in keys.values() for key in found}, config.tie_word_embeddings)
    for name, shape in shapes.items():
        for key in keys[name]:
            check_shape(folder, key, stored[key].shape, _stored_shape(name, shape, keys[name]), config.vocab_size)

    def values(tensor_slice: TensorSlice) -> torch.Tensor:
        if keys[tensor_slice.name] == [tensor_slice.name]:
            return tensor_slice.extract(stored[tensor_slice.name].read())
        return _read_experts(stored, keys[tensor_slice.name], tensor_slice)

    return values


def _open_weights(folder: Path) -> StoredWeights:
    """Return the tensors from which training starts: no multi-token prediction layers, FP8 matrices with their factors."""
    config = read_json(folder / "config.json", DAMAGED_PRETRAINED_HINT)
    tensors = _open_files(folder, excluded_prefixes=mtp_prefixes(config))
    return _with_factors(folder, tensors, fp8_block_shape(config, f"{folder}/config.json"))


def _open_files(folder: Path, excluded_prefixes: tuple[str, ...]) -> dict[str, LazyTensor]:
    """Return name -> tensor of all safetensors files; UserError when there is none, or a tensor is in two of them."""
    tensors: dict[str, LazyTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        opened = {
            key: tensor for key, tensor in open_safetensors(path).items() if not key.startswith(excluded_prefixes)
        }
        if doubled := sorted(set(opened) & set(tensors)):
            raise UserError(f"{folder}: {doubled[0]} is in two files, the second is {path.name}", TWO_FILES_HINT)
        tensors |= opened
    if not tensors:
        raise UserError(f"{folder} holds no *.safetensors", "save the model with save_pretrained: pickles are not read")
    return tensors


def _with_factors(folder: Path, tensors: dict[str, LazyTensor], block: tuple[int, int] | None) -> StoredWeights:
    """Return the tensors with every FP8 matrix combined with its factors; block: shape of its blocks."""
    quantized = {key for key, tensor in tensors.items() if tensor.pieces[0].dtype == torch.float8_e4m3fn}
    if quantized and not block:
        raise UserError(
            f"{folder}: {min(quantized)} is stored as FP8, and config.json has no quantization_config",
            "restore the config.json that belongs to the weights",
        )
    scaled = {key: _block_scaled(folder, tensors, key, block) for key in quantized if block}
    factors = {key + _SCALE for key in quantized}
    return {key: scaled.get(key, tensor) for key, tensor in tensors.items() if key not in factors}


def _block_scaled(folder: Path, tensors: dict[str, LazyTensor], key: str, block: tuple[int, int]) -> BlockScaledTensor:
    weight, scale = tensors[key], tensors.get(key + _SCALE)
    if scale is None:
        raise UserError(f"{folder}: {key} is stored as FP8 without its factors {key + _SCALE}", WRONG_WEIGHTS_HINT)
    expected = tuple(-(-size // part) for size, part in zip(weight.shape, block, strict=False))
    if len(weight.shape) != 2 or scale.shape != expected or not scale.dtype.is_floating_point:
        raise UserError(
            f"{folder}: {key + _SCALE} is {list(scale.shape)} {scale.pieces[0].dtype}, but {list(weight.shape)} in blocks "
            f"of {block[0]} x {block[1]} has {list(expected)} factors",
            WRONG_WEIGHTS_HINT,
        )
    return BlockScaledTensor(weight, scale, block)


def _stored_shape(name: str, shape: tuple[int, ...], keys: list[str]) -> tuple[int, ...]:
    """Return the shape of each of a tensor's keys in the folder."""
    return tuple(shape) if keys == [name] else (shape[0] * shape[1] // len(keys), shape[2])


def _read_experts(stored: StoredWeights, keys: list[str], tensor_slice: TensorSlice) -> torch.Tensor:
    """Return the slice's experts [E, rows, columns], read one by one."""
    keys_per_expert = len(keys) // tensor_slice.shape[0]
    local = torch.empty(tensor_slice.local_shape)
    inner_ranges = {axis - 1: ranges for axis, ranges in tensor_slice.axis_ranges.items() if axis}
    inside = TensorSlice(tensor_slice.name, tensor_slice.shape[1:], inner_ranges)
    experts = [expert for start, stop in tensor_slice.ranges(0) for expert in range(start, stop)]
    for place, expert in enumerate(experts):
        own_keys = keys[expert * keys_per_expert : (expert + 1) * keys_per_expert]
        local[place] = inside.extract(torch.cat([stored[key].read() for key in own_keys]))
    return local
