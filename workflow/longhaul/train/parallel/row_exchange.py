"""Exchanges rows among ranks by all-to-all while the GPU computes something else, in the forward and in the backward pass.

    exchange = RowExchange(rows, sent, received, group)     the rows are under way
    …                                                       what does not need them
    arrived = exchange.wait()

Autograd computes backwards: the gradient of `wait` starts the exchange of the gradients, then comes the gradient of what was
computed in between, and the gradient of the start waits. On GPUs, "wait" lets the GPU's later work wait, not the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class RowExchange:
    """An all-to-all of rows with a gradient, in the order of the group's ranks.

    rows:     [at least sum(sent), …], sorted by the rank that gets them. Rows behind sum(sent) stay here; their gradient is
              undefined.
    sent:     number of rows for each rank
    received: number of rows from each rank
    room:     rows of the result, at least sum(received), which is the default. Rows behind sum(received) are undefined.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        sent: list[int],
        received: list[int],
        group: dist.ProcessGroup | None,
        room: int | None = None,
    ) -> None:
        self._all_to_all = _RowsUnderWay(len(rows), sent, received, group)
        self._arriving: Any = _Start.apply(rows, self._all_to_all, sum(received) if room is None else room)

    def wait(self) -> torch.Tensor:
        """Return the received rows [room, …]. Call it once."""
        arriving, self._arriving = self._arriving, None
        arrived: Any = _Wait.apply(arriving, self._all_to_all)
        return arrived


class _RowsUnderWay:
    """The all-to-all that is under way: of the rows, later of their gradients. It keeps their memory until they arrived."""

    def __init__(self, rows: int, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> None:
        self.rows, self.sent, self.received, self._group = rows, sent, received, group
        self._under_way: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def start(self, rows: torch.Tensor, sent: list[int], received: list[int], room: int) -> torch.Tensor:
        arriving = rows.new_empty((room, *rows.shape[1:]))
        own = rows[: sum(sent)].contiguous()
        work = dist.all_to_all_single(arriving[: sum(received)], own, received, sent, group=self._group, async_op=True)
        self._under_way = work, arriving, own
        return arriving

    def wait(self) -> torch.Tensor:
        assert self._under_way is not None, "no all-to-all is under way"
        (work, arrived, _own), self._under_way = self._under_way, None
        work.wait()
        return arrived


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, all_to_all: _RowsUnderWay, room: int) -> torch.Tensor:
        ctx.all_to_all = all_to_all
        return all_to_all.start(rows, all_to_all.sent, all_to_all.received, room)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        return ctx.all_to_all.wait(), None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: torch.Tensor, all_to_all: _RowsUnderWay) -> torch.Tensor:
        ctx.all_to_all = all_to_all
        all_to_all.wait()
        return arriving.view_as(arriving)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        # _Start returns the gradients that arrive. What is returned here only has the shape that autograd expects.
        exchange: _RowsUnderWay = ctx.all_to_all
        exchange.start(slopes[0], exchange.received, exchange.sent, exchange.rows)
        return slopes[0], None
