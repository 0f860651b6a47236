"""Collectives with a gradient (sum, copy, all-to-all over a group), as operators that torch.compile captures.

Each collective is an operator of its own with the name of the group as its argument: torch.compile captures such an operator
as it is. A process group itself would be a constant of the graph, which torch does not accept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_GROUPS: dict[str, dist.ProcessGroup | None] = {}
"""The process groups that operators use, by their names. A name of None is the group of all ranks."""


def name_group(group: dist.ProcessGroup | None) -> str:
    """Return a name under which the operators of this module find the group; None is the group of all ranks."""
    name = "" if group is None else group.group_name
    _GROUPS[name] = group
    return name


@torch.library.custom_op("longhaul::sum_over_group", mutates_args=())
def all_reduced(tensor: torch.Tensor, group: str) -> torch.Tensor:
    """Return the sum of the tensor over the ranks of the named group; it has no gradient."""
    # A collective needs a contiguous tensor of its own: on a view it would change only a part of the gradient.
    summed = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed, group=_GROUPS[group])
    return summed


@all_reduced.register_fake
def _(tensor: torch.Tensor, group: str) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@torch.library.custom_op("longhaul::exchange_rows", mutates_args=())
def _exchange_rows(rows: torch.Tensor, sent: list[int], received: list[int], group: str) -> torch.Tensor:
    arrived = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=_GROUPS[group])
    return arrived


@_exchange_rows.register_fake
def _(rows: torch.Tensor, sent: list[int], received: list[int], group: str) -> torch.Tensor:
    return rows.new_empty((sum(received), *rows.shape[1:]))


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return all_reduced(gradients[0], ctx.group), None


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: str) -> torch.Tensor:
        return all_reduced(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0], None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: str) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange_rows(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _exchange_rows(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None


def copy_to_group(tensor: torch.Tensor, group: str) -> torch.Tensor:
    """Return the tensor, which is equal on all ranks of the group; in the backward pass, sum its gradient over the group."""
    return _CopyToGroup.apply(tensor, group)  # pyright: ignore[reportReturnType]


def sum_over_group(tensor: torch.Tensor, group: str) -> torch.Tensor:
    """Return the sum over the ranks of the group, on every rank; in the backward pass, pass the gradient on unchanged."""
    return _SumOverGroup.apply(tensor, group)  # pyright: ignore[reportReturnType]


def all_to_all(rows: torch.Tensor, sent: list[int], received: list[int], group: str) -> torch.Tensor:
    """Exchange rows among the ranks of the named group, in the order of its ranks.

    rows:     [sum(sent), …], sorted by the rank that gets them
    sent:     number of rows for each rank
    received: number of rows from each rank
    Returns the received rows [sum(received), …].
    """
    return _AllToAll.apply(rows, sent, received, group)  # pyright: ignore[reportReturnType]
