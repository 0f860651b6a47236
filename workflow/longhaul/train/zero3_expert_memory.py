"""ZeRO-3 and experts: nothing of their gathered weights is kept from the forward pass to the backward one.

ZeRO-3 gathers a module's weights, lets them go after its forward pass, and gathers them again before its backward pass. What
autograd keeps of a parameter itself goes with the parameter. But experts multiply by transposed views of their weights, and a
view that autograd keeps holds the gathered bytes: by the end of the forward pass, those of every expert of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from longhaul.train.parallel.tensor_slices import decoder_layers


def release_expert_weights(model: Any) -> None:
    """Has the experts of a Hugging Face causal LM keep no view of their weights.

    Not for layers that are recomputed: these keep nothing of their weights, and torch's checkpoint sees what autograd keeps by
    hooks of the same kind, of which the innermost alone are asked.
    """
    for layer in decoder_layers(model):
        if experts := getattr(layer.mlp, "experts", None):
            computing = getattr(experts, "local", experts)
            computing.forward = _keeping_no_view(computing)


def _keeping_no_view(experts: torch.nn.Module) -> Callable[..., torch.Tensor]:
    forward, weights = experts.forward, list(experts.parameters(recurse=False))

    @wraps(forward)
    def keeping_no_view(*arguments: Any, **named: Any) -> torch.Tensor:
        with saved_tensors_hooks(lambda kept: _packed(kept, weights), _unpacked):
            return forward(*arguments, **named)

    return keeping_no_view


@dataclass(frozen=True)
class _View:
    """Elements of a parameter: where they lie in it, not what they are."""

    parameter: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _packed(kept: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor | _View:
    storage = kept.untyped_storage().data_ptr()
    for weight in weights:
        offset = int(kept.storage_offset() - weight.storage_offset())
        # Several parameters are gathered into one storage.
        if weight.untyped_storage().data_ptr() == storage and 0 <= offset < weight.numel():
            return _View(weight, kept.shape, kept.stride(), offset)
    return kept


def _unpacked(kept: torch.Tensor | _View) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    return kept.parameter.data.as_strided(kept.shape, kept.stride, kept.parameter.storage_offset() + kept.offset)
