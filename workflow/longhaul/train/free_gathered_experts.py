"""Frees the gathered weights of experts under ZeRO 3 between forward and backward pass.

ZeRO 3 gathers a module's weights, releases them after its forward pass, and gathers them again before its backward pass. What
autograd keeps of a parameter itself is released with the parameter. But experts multiply by transposed views of their weights,
and a view that autograd keeps holds the gathered bytes: at the end of the forward pass, those of every expert of the model.

Here autograd keeps, in place of a view, where it lies in the parameter. The backward pass reads it from the weights that ZeRO 3
has gathered by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from longhaul.train.parallel.sliced_parameters import decoder_layers


def release_expert_weights(model: Any) -> None:
    """Make the experts of a Hugging Face causal LM keep no view of their weights for the backward pass.

    Layers that are recomputed do not need it: they keep nothing of their weights. They must not have it either: torch's
    checkpoint observes what autograd keeps through hooks of the same kind, and only the innermost hooks are called.
    """
    for layer in decoder_layers(model):
        if experts := getattr(layer.mlp, "experts", None):
            computing = getattr(experts, "local", experts)
            computing.forward = _without_saved_views(computing)


def _without_saved_views(experts: torch.nn.Module) -> Callable[..., torch.Tensor]:
    forward, weights = experts.forward, list(experts.parameters(recurse=False))

    @wraps(forward)
    def forward_without_saved_views(*arguments: object, **named: object) -> torch.Tensor:
        with saved_tensors_hooks(lambda kept: _pack(kept, weights), _unpack):
            return forward(*arguments, **named)

    return forward_without_saved_views


@dataclass(frozen=True)
class _View:
    """Position of a view in its parameter, without the values."""

    parameter: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _pack(kept: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor | _View:
    """Return a _View of a tensor that lies in one of the weights; any other tensor unchanged."""
    storage = kept.untyped_storage().data_ptr()
    for weight in weights:
        offset = int(kept.storage_offset() - weight.storage_offset())
        # Several parameters are gathered into one storage.
        if weight.untyped_storage().data_ptr() == storage and 0 <= offset < weight.numel():
            return _View(weight, kept.shape, kept.stride(), offset)
    return kept


def _unpack(kept: torch.Tensor | _View) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    return kept.parameter.data.as_strided(kept.shape, kept.stride, kept.parameter.storage_offset() + kept.offset)
