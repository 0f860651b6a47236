"""Adds up numbers of a forward pass, such as tokens per expert, once where activation checkpointing repeats it."""

from __future__ import annotations

import torch

from longhaul.compat.torch import is_in_backward_pass


@torch.library.custom_op("longhaul::record_in_forward_pass", mutates_args=())
def record_in_forward_pass(tensor: torch.Tensor, amount: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Add `amount` to `total`, except where a backward pass computes the layer again. Return a copy of `tensor`.

    The layer uses the copy: a compiler removes an operator whose result is not used. `total` is not declared as changed.
    Nothing in the layer reads it, and torch lets no region with activation checkpointing change its inputs.
    """
    if not is_in_backward_pass():
        total += amount
    return tensor.clone()


@record_in_forward_pass.register_fake
def _(tensor: torch.Tensor, amount: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor)
