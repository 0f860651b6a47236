"""Makes rows of tokens, one for each choice, sorted by what is chosen, and sums rows for each token; the gradients of both.

Tokens choose experts, or ranks that hold experts. Autograd turns the reading of rows into additions at indices, for which torch
sorts the indices again. Here each choice knows the place of its row, so the backward pass reads rows as well, and the compiler
fuses the reading with the arithmetic around it. No sum depends on the order of threads. Sums are computed in fp32 or better.

N tokens, K choices for each token, S rows, sorted by choice, W width of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Places(NamedTuple):
    """Where the rows of tokens are.

    order_S:   index into the flattened [N, K] of every row
    place_NK:  row of every choice; -1 for a choice without a row
    has_rests: whether choices may have no row. If all have one, nothing is computed to leave any out.
    """

    order_S: torch.Tensor
    place_NK: torch.Tensor
    has_rests: bool


def sort_by_choice(chosen_NK: torch.Tensor, choices: int) -> Places:
    """Return the places of rows that are sorted by what their token chose, 0 to `choices` - 1, then by token."""
    # A sort takes time for each byte of its keys.
    keys_S = chosen_NK.flatten().to(torch.uint8 if choices <= 256 else torch.int32)
    order_S = keys_S.argsort(stable=True)
    place_S = torch.zeros_like(order_S).scatter(0, order_S, torch.arange(len(order_S), device=order_S.device))
    return Places(order_S, place_S.view_as(chosen_NK), has_rests=False)


def sort_some_by_choice(chosen_NK: torch.Tensor, choices: int) -> Places:
    """Return the same for tokens of which some have fewer than K choices: the number `choices` stands in the remaining ones.

    These have no row. `order_S` ends with them, so that its length N · K is known without a look at the numbers; the caller
    cuts it.
    """
    order_S, place_NK, _ = sort_by_choice(chosen_NK, choices + 1)
    return Places(order_S, place_NK.masked_fill(chosen_NK == choices, -1), has_rests=True)


def count_choices(chosen_NK: torch.Tensor, choices: int) -> torch.Tensor:
    """Return how often each of 0 to `choices` - 1 is chosen [choices]."""
    return (chosen_NK.flatten()[:, None] == torch.arange(choices, device=chosen_NK.device)).sum(0)


def read_rows(tokens_NW: torch.Tensor, places: Places) -> torch.Tensor:
    """Return rows[s] = tokens[order[s] // K]; [N, W] -> [S, W]."""
    rows_SW: Any = _ReadRows.apply(tokens_NW, *places)
    return rows_SW


def sum_rows(rows_SW: torch.Tensor, places: Places) -> torch.Tensor:
    """Return the sum of each token's rows; [S, W] -> [N, W], in the precision of the rows."""
    summed_NW: Any = _SumRows.apply(rows_SW, *places)
    return summed_NW


def sum_weighted_rows(rows_SW: torch.Tensor, weights_NK: torch.Tensor, places: Places) -> torch.Tensor:
    """Return the sum over k of weights[n, k] · rows[place[n, k]]; [S, W] -> [N, W], in the precision of the products."""
    summed_NW: Any = _SumWeightedRows.apply(rows_SW, weights_NK, *places)
    return summed_NW


def read_few_rows(tokens_NW: torch.Tensor, token_S: torch.Tensor) -> torch.Tensor:
    """Return rows[s] = tokens[token[s]]; [N, W] -> [S, W]. Without a compiler, and if most choices have no row.

    `read_rows` would have a tensor [N, K, W] in its backward pass. Autograd's own gradient would round after each addition.
    """
    rows_SW: Any = _ReadFewRows.apply(tokens_NW, token_S)
    return rows_SW


def sum_few_rows(rows_SW: torch.Tensor, token_S: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the sum of each token's rows; [S, W] -> [tokens, W], in fp32 or better. It is the counterpart of `read_few_rows`."""
    sums_NW: Any = _SumFewRows.apply(rows_SW, token_S, tokens)
    return sums_NW


def summing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of a sum of numbers of this precision: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _rows_of_choices(rows_SW: torch.Tensor, place_NK: torch.Tensor, has_rests: bool) -> torch.Tensor:
    """Return the row of every choice, and zeros for a choice without a row: [S, W] -> [N, K, W]."""
    if not has_rests:
        return rows_SW[place_NK]
    return torch.where(place_NK[..., None] >= 0, rows_SW[place_NK.clamp(min=0)], 0)


def _sum_few_rows(rows_SW: torch.Tensor, token_S: torch.Tensor, tokens: int) -> torch.Tensor:
    sums_NW = rows_SW.new_zeros(tokens, rows_SW.shape[1], dtype=summing_dtype(rows_SW.dtype))
    rows_SW = rows_SW.to(sums_NW.dtype)
    # On GPUs index_add is atomic, and index_put sorts. On CPUs it is the other way round: threads of index_put add atomically.
    if rows_SW.is_cuda:
        return sums_NW.index_put((token_S,), rows_SW, accumulate=True)
    return sums_NW.index_add(0, token_S, rows_SW)


def _sum_rows(rows_SW: torch.Tensor, place_NK: torch.Tensor, has_rests: bool) -> torch.Tensor:
    rows_NKW = _rows_of_choices(rows_SW, place_NK, has_rests)
    sums_NW = rows_NKW.sum(1, dtype=summing_dtype(rows_SW.dtype))
    # Compiled code of torch 2.11 loses the gradient of a function that ends with a conversion that changes nothing.
    return sums_NW if sums_NW.dtype == rows_SW.dtype else sums_NW.to(rows_SW.dtype)


class _ReadRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens_NW: torch.Tensor, order_S: torch.Tensor, place_NK: torch.Tensor, has_rests: bool
    ) -> torch.Tensor:
        ctx.has_rests = has_rests
        ctx.save_for_backward(place_NK)
        return tokens_NW[order_S // place_NK.shape[1]]

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        (place_NK,) = ctx.saved_tensors
        return _sum_rows(slopes[0], place_NK, ctx.has_rests), None, None, None


class _ReadFewRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_NW: torch.Tensor, token_S: torch.Tensor) -> torch.Tensor:
        ctx.tokens = len(tokens_NW)
        ctx.save_for_backward(token_S)
        return tokens_NW[token_S]

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        (token_S,) = ctx.saved_tensors
        return _sum_few_rows(slopes[0], token_S, ctx.tokens).to(slopes[0].dtype), None


class _SumFewRows(torch.autograd.Function):
    """Keeps no rows for the backward pass; index_add would keep those that it adds."""

    @staticmethod
    def forward(ctx: Any, rows_SW: torch.Tensor, token_S: torch.Tensor, tokens: int) -> torch.Tensor:
        ctx.dtype = rows_SW.dtype
        ctx.save_for_backward(token_S)
        return _sum_few_rows(rows_SW, token_S, tokens)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        (token_S,) = ctx.saved_tensors
        return slopes[0][token_S].to(ctx.dtype), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_SW: torch.Tensor, order_S: torch.Tensor, place_NK: torch.Tensor, has_rests: bool
    ) -> torch.Tensor:
        ctx.choices = place_NK.shape[1]
        ctx.save_for_backward(order_S)
        return _sum_rows(rows_SW, place_NK, has_rests)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        (order_S,) = ctx.saved_tensors
        return slopes[0][order_S // ctx.choices], None, None, None


class _SumWeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_SW: torch.Tensor,
        weights_NK: torch.Tensor,
        order_S: torch.Tensor,
        place_NK: torch.Tensor,
        has_rests: bool,
    ) -> torch.Tensor:
        ctx.has_rests = has_rests
        ctx.save_for_backward(rows_SW, weights_NK, order_S, place_NK)
        return (_rows_of_choices(rows_SW, place_NK, has_rests) * weights_NK[..., None]).sum(1)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        rows_SW, weights_NK, order_S, place_NK = ctx.saved_tensors
        slopes_SW, dtype = slopes[0][order_S // place_NK.shape[1]], summing_dtype(rows_SW.dtype)
        rows_slopes_SW = slopes_SW * weights_NK.flatten()[order_S, None]
        weights_slopes_S1 = (slopes_SW.to(dtype) * rows_SW.to(dtype)).sum(-1, keepdim=True)
        weights_slopes_NK = _rows_of_choices(weights_slopes_S1, place_NK, ctx.has_rests)[..., 0]
        return rows_slopes_SW.to(rows_SW.dtype), weights_slopes_NK.to(weights_NK.dtype), None, None, None
