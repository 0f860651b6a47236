"""First weights from a Hugging Face folder, one tensor at a time: of each, no rank reads experts that it does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longhaul.artifacts.files import read_json
from longhaul.checkpoint_io import LazyTensor, open_safetensors
from longhaul.checkpoint_io.tensor_parts import Shard
from longhaul.config.pretrained_format import expert_keys, fp8_block, further_layers
from longhaul.errors import UserError

_SCALE = "_scale_inv"
_HINT = "the weights do not belong to this config.json, or the download is incomplete"
_NAMED = 5


@dataclass(frozen=True)
class BlockScaled:
    """A float8_e4m3fn matrix with one factor for each block; reads like a LazyTensor, as fp32.

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
            of_columns_N = factors.repeat_interleave(columns)[: values_MN.shape[1]]
            values_MN[index * rows : (index + 1) * rows].mul_(of_columns_N)
        return values_MN


def pretrained_values(folder: Path, shapes: dict[str, tuple[int, ...]], config: Any) -> Callable[[Shard], torch.Tensor]:
    """The values of parts of the model's tensors, read from safetensors when they are asked for.

    shapes: of all tensors of the model, as transformers has them; the hub's folder holds experts one by one.
    config: the model's. How the folder's weights are stored stands in its own config.json.

    Raises:
        UserError: a tensor is missing, left over or of another shape or type. The layers that predict further tokens, which
            DeepSeek's folders hold behind the last one, are left out.
    """
    stored = _open(folder)
    keys = {name: expert_keys(name, shape) or [name] for name, shape in shapes.items()}
    _check_keys(folder, stored, {key for found in keys.values() for key in found}, config)
    for name, shape in shapes.items():
        _check_shapes(
            folder, [(key, stored[key].shape) for key in keys[name]], _stored_shape(name, shape, keys[name]), config
        )

    def values(shard: Shard) -> torch.Tensor:
        if keys[shard.name] == [shard.name]:
            return shard.cut(stored[keys[shard.name][0]].read())
        return _experts(stored, keys[shard.name], shard)

    return values


def _open(folder: Path) -> dict[str, LazyTensor | BlockScaled]:
    """Name -> tensor as it is trained: without the layers that predict further tokens, FP8 matrices with their factors."""
    stored_config = read_json(folder / "config.json")
    left_out = further_layers(stored_config)
    found: dict[str, LazyTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        opened = {key: tensor for key, tensor in open_safetensors(path).items() if not key.startswith(left_out)}
        if doubled := sorted(set(opened) & set(found)):
            raise UserError(f"{folder}: {doubled[0]} is in two files, the second is {path.name}", _HINT)
        found |= opened
    if not found:
        raise UserError(f"{folder} holds no *.safetensors", "save the model with save_pretrained: pickles are not read")
    block = fp8_block(stored_config, f"{folder}/config.json")
    quantised = {key for key, tensor in found.items() if tensor.pieces[0].dtype == torch.float8_e4m3fn}
    if quantised and not block:
        raise UserError(
            f"{folder}: {min(quantised)} is stored as FP8, and config.json has no quantization_config",
            "restore the config.json that belongs to the weights",
        )
    scaled = {key: _block_scaled(folder, found, key, block) for key in quantised if block}
    used = {key + _SCALE for key in quantised}
    return {key: scaled.get(key, tensor) for key, tensor in found.items() if key not in used}


def _block_scaled(folder: Path, found: dict[str, LazyTensor], key: str, block: tuple[int, int]) -> BlockScaled:
    weight, scale = found[key], found.get(key + _SCALE)
    if scale is None:
        raise UserError(f"{folder}: {key} is stored as FP8 without its factors {key + _SCALE}", _HINT)
    wanted = tuple(-(-size // part) for size, part in zip(weight.shape, block, strict=False))
    if len(weight.shape) != 2 or scale.shape != wanted or not scale.dtype.is_floating_point:
        raise UserError(
            f"{folder}: {key + _SCALE} is {list(scale.shape)} {scale.pieces[0].dtype}, but {list(weight.shape)} in blocks "
            f"of {block[0]} x {block[1]} has {list(wanted)} factors",
            _HINT,
        )
    return BlockScaled(weight, scale, block)


def _check_keys(folder: Path, stored: Iterable[str], wanted: set[str], config: Any) -> None:
    known = wanted | ({"lm_head.weight"} if config.tie_word_embeddings else set())
    for kind, names in (("missing keys", wanted - set(stored)), ("unexpected keys", set(stored) - known)):
        if names:
            some = ", ".join(sorted(names)[:_NAMED])
            raise UserError(f"{folder}: {kind}: {some} ({len(names)} in all)", _HINT)


def _check_shapes(
    folder: Path, stored: list[tuple[str, tuple[int, ...]]], wanted: tuple[int, ...], config: Any
) -> None:
    for key, shape in stored:
        if shape == wanted:
            continue
        rows = shape[0] if shape else 0
        if key in ("model.embed_tokens.weight", "lm_head.weight") and rows != config.vocab_size:
            raise UserError(
                f"{folder}: {key} has {rows} rows, but config.json's vocab_size is {config.vocab_size}",
                f"set vocab_size to {rows}, if that is the tokenizer's too, or restore the weights' own config.json",
            )
        raise UserError(f"{folder}: {key} is {list(shape)}, the model wants {list(wanted)}", _HINT)


def _stored_shape(name: str, shape: tuple[int, ...], keys: list[str]) -> tuple[int, ...]:
    """Of each of a tensor's keys."""
    return tuple(shape) if keys == [name] else (shape[0] * shape[1] // len(keys), shape[2])


def _experts(stored: dict[str, LazyTensor | BlockScaled], keys: list[str], shard: Shard) -> torch.Tensor:
    """The shard's experts [E, rows, columns], read one by one."""
    each = len(keys) // shard.shape[0]
    local = torch.empty(shard.local_shape)
    inside = Shard(shard.name, shard.shape[1:], {axis - 1: part for axis, part in shard.parts.items() if axis})
    experts = [expert for start, stop in shard.ranges(0) for expert in range(start, stop)]
    for place, expert in enumerate(experts):
        projections = [stored[key].read() for key in keys[expert * each : (expert + 1) * each]]
        local[place] = inside.cut(torch.cat(projections))
    return local
