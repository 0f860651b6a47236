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


@torch.library.custom_op("longhaul::exchange_blocks", mutates_args=())
def _exchange_blocks(blocks: torch.Tensor, group: str) -> torch.Tensor:
    arrived = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    dist.all_to_all_single(arrived, blocks.contiguous(), group=_GROUPS[group])
    return arrived


@_exchange_blocks.register_fake
def _(blocks: torch.Tensor, group: str) -> torch.Tensor:
    return torch.empty_like(blocks, memory_format=torch.contiguous_format)


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
    def forward(ctx: Any, blocks: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return _exchange_blocks(blocks, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _exchange_blocks(gradients[0], ctx.group), None


def copy_to_group(tensor: torch.Tensor, group: str) -> torch.Tensor:
    """Return the tensor, which is equal on all ranks of the group; in the backward pass, sum its gradient over the group."""
    return _CopyToGroup.apply(tensor, group)  # pyright: ignore[reportReturnType]


def sum_over_group(tensor: torch.Tensor, group: str) -> torch.Tensor:
    """Return the sum over the ranks of the group, on every rank; in the backward pass, pass the gradient on unchanged."""
    return _SumOverGroup.apply(tensor, group)  # pyright: ignore[reportReturnType]


def all_to_all(blocks: torch.Tensor, group: str) -> torch.Tensor:
    """Return the blocks that the ranks of the named group sent to this one [ranks, …]. Block i of `blocks` goes to rank i.

    Rows whose number differs between ranks are exchanged by row_exchange.py.
    """
    return _AllToAll.apply(blocks, group)  # pyright: ignore[reportReturnType]
