"""Collectives with a gradient: the operators f and g of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053), and all-to-all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        # A collective needs a contiguous tensor of its own: on a view it would change only a part of the gradient.
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _SumOverGroup(torch.autograd.Function):
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
        return _exchange_rows(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _exchange_rows(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None


def copy_to_group(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the tensor, which is equal on all ranks of the group; in the backward pass, sum its gradient over the group."""
    return _CopyToGroup.apply(tensor, group)  # pyright: ignore[reportReturnType]


def sum_over_group(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the sum over the ranks of the group, on every rank; in the backward pass, pass the gradient on unchanged."""
    return _SumOverGroup.apply(tensor, group)  # pyright: ignore[reportReturnType]


def all_to_all(rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
    """Exchange rows among the ranks of the group, in the order of its ranks.

    rows:     [sum(sent), …], sorted by the rank that gets them
    sent:     number of rows for each rank
    received: number of rows from each rank
    Returns the received rows [sum(received), …].
    """
    return _AllToAll.apply(rows, sent, received, group)  # pyright: ignore[reportReturnType]


def _exchange_rows(rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
    arrived = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
