"""Parameters that are parts of the Hugging Face model's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from longhaul.checkpoint_io.tensor_parts import Ranges, Shard


def shard_parameter(module: torch.nn.Module, name: str, parts: Mapping[int, Ranges]) -> torch.nn.Parameter:
    """Replaces a parameter without memory (device meta) by one of its part's shape.

    The part of a part is a part of the whole: experts are split over ranks, and each again over tensor ranks.
    """
    whole: Any = getattr(module, name)
    earlier: Shard | None = getattr(whole, "shard", None)
    shape = earlier.shape if earlier else tuple(whole.shape)
    shard = Shard("", shape, {**(earlier.parts if earlier else {}), **parts})
    local: Any = torch.nn.Parameter(torch.empty(shard.local_shape, dtype=whole.dtype, device=whole.device))
    local.__dict__.update(whole.__dict__, shard=shard)
    setattr(module, name, local)
    return local


def even_part(size: int, index: int, count: int) -> Ranges:
    """The index-th of `count` equal parts of `size` elements."""
    if size % count:
        raise ValueError(f"{size} is no multiple of {count}")
    return ((size // count * index, size // count * (index + 1)),)


def shard_of(name: str, tensor: torch.Tensor) -> Shard:
    """A parameter's or buffer's part of the model's tensor `name`."""
    own: Shard | None = getattr(tensor, "shard", None)
    return Shard(name, own.shape, own.parts) if own else Shard(name, tuple(getattr(tensor, "ds_shape", tensor.shape)))


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers that this rank has of a Hugging Face causal LM; of a pipeline's stage, they have their own keys."""
    layers = model.model.layers
    return list(layers.values() if isinstance(layers, torch.nn.ModuleDict) else layers)
