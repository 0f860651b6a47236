"""Replaces a parameter by its slice and marks it with its TensorSlice. A parameter carries its TensorSlice as an attribute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from longhaul.checkpoint_io.tensor_slice import Ranges, TensorSlice
from longhaul.compat.deepspeed import unpartitioned_shape


def slice_parameter(module: torch.nn.Module, name: str, axis_ranges: Mapping[int, Ranges]) -> torch.nn.Parameter:
    """Replace a parameter without memory (device meta) by one of the slice's shape.

    A parameter that is a slice already is sliced along further axes: experts are divided over expert ranks, and each expert
    over tensor ranks.
    """
    whole: Any = getattr(module, name)
    earlier: TensorSlice | None = getattr(whole, "tensor_slice", None)
    shape = earlier.shape if earlier else tuple(whole.shape)
    tensor_slice = TensorSlice("", shape, {**(earlier.axis_ranges if earlier else {}), **axis_ranges})
    local: Any = torch.nn.Parameter(torch.empty(tensor_slice.local_shape, dtype=whole.dtype, device=whole.device))
    local.__dict__.update(whole.__dict__, tensor_slice=tensor_slice)
    setattr(module, name, local)
    return local


def equal_range(size: int, index: int, count: int) -> Ranges:
    """Return range number `index` of `count` equal ranges that divide an axis of `size` elements."""
    if size % count:
        raise ValueError(f"{size} is not a multiple of {count}")
    return ((size // count * index, size // count * (index + 1)),)


def slice_of(name: str, tensor: torch.Tensor) -> TensorSlice:
    """Return the slice of the model's tensor `name` that a parameter or buffer is; it may be the whole tensor."""
    own: TensorSlice | None = getattr(tensor, "tensor_slice", None)
    return TensorSlice(name, own.shape, own.axis_ranges) if own else TensorSlice(name, unpartitioned_shape(tensor))


def decoder_layers(model: Any) -> list[Any]:
    """Return the decoder layers that this rank has of a Hugging Face causal LM, with or without pipeline parallelism."""
    layers = model.model.layers
    return list(layers.values() if isinstance(layers, torch.nn.ModuleDict) else layers)
