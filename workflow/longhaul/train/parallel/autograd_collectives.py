"""Collectives that a gradient passes through. The pairs f and g of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        # Contiguous and new: a collective on a view would leave the rest of the gradient behind.
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        summed = tensor.contiguous().clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _all_to_all(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None


def copy_to(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The same tensor on every rank of the group; its gradient is the sum of theirs."""
    return _Copy.apply(tensor, group)  # pyright: ignore[reportReturnType]


def reduce_from(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over the group, on every rank; its gradient goes to each as it is."""
    return _Reduce.apply(tensor, group)  # pyright: ignore[reportReturnType]


def all_to_all(rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
    """Sends rows [sum(sent), …] to the ranks of the group in order; returns those received [sum(received), …]."""
    return _AllToAll.apply(rows, sent, received, group)  # pyright: ignore[reportReturnType]


def _all_to_all(rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
    found = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
    return found
