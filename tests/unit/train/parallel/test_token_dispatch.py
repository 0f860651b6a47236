"""Rows of tokens, sorted by what they chose, and their sums: values and gradients, also of choices without a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longhaul.train.parallel.token_dispatch import (
    Places,
    count_choices,
    read_few_rows,
    read_rows,
    sort_by_choice,
    sort_some_by_choice,
    sum_few_rows,
    sum_rows,
    sum_weighted_rows,
)

CHOSEN = torch.tensor([[2, 0, 1], [0, 3, 3], [1, 3, 0]])
"""A token chooses 0, 1 or 2. The number 3 stands for no choice."""
ROWS = 6


def places() -> Places:
    whole = sort_some_by_choice(CHOSEN, 3)
    return whole._replace(order_S=whole.order_S[:ROWS])


def test_rows_are_sorted_by_choice_then_by_token():
    order, place, _ = places()
    assert order.tolist() == [1, 3, 8, 2, 6, 0]
    assert place.tolist() == [[5, 0, 3], [1, -1, -1], [4, -1, 2]]
    assert count_choices(CHOSEN, 3).tolist() == [3, 2, 1]


@pytest.mark.parametrize("choices", [3, 255, 256, 70_000])
def test_any_number_of_choices_is_sorted(choices: int):
    chosen = torch.tensor([[choices - 1, 0], [choices, 1]])
    order, place, _ = sort_some_by_choice(chosen, choices)
    assert order.tolist() == [1, 3, 0, 2] and place.tolist() == [[2, 0], [-1, 1]]
    order, place, _ = sort_by_choice(chosen.clamp(max=choices - 1), choices)
    assert order.tolist() == [1, 3, 0, 2] and place.tolist() == [[2, 0], [3, 1]]


class Operators(TorchDispatchMode):
    """Collects the operators that torch computes, and the precision of the keys that it sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.keys: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        if "sort" in func.overloadpacket.__name__:
            self.keys.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_rows_that_every_choice_has_are_read_as_they_are():
    """Experts that ranks do not divide pay nothing for choices without a row, and one byte for each key of 256 experts."""
    tokens, weights, chosen = torch.randn(3, 4, requires_grad=True), torch.rand(3, 2, requires_grad=True), CHOSEN[:, :2]
    with Operators() as found:
        every = sort_by_choice(chosen, 256)
        rows = read_rows(tokens, every)
        sum_weighted_rows(rows, weights, every).sum().backward()
    assert not found.names & {"where", "masked_fill", "clamp", "clamp_min", "ge", "eq"}
    assert found.keys == {torch.uint8} and weights.grad is not None
    torch.testing.assert_close(weights.grad, tokens.sum(1, keepdim=True).expand(3, 2))


def test_values_are_those_of_a_loop():
    tokens, weights = torch.randn(3, 4), torch.rand(3, 3)
    rows = read_rows(tokens, places())
    assert torch.equal(rows, tokens[torch.tensor([0, 1, 2, 0, 2, 0])])
    used = (CHOSEN < 3)[..., None]
    torch.testing.assert_close(sum_rows(rows, places()), (tokens[:, None] * used).sum(1))
    torch.testing.assert_close(
        sum_weighted_rows(rows, weights, places()), (tokens[:, None] * used * weights[..., None]).sum(1)
    )


def test_gradients_are_those_of_the_values():
    tokens, rows = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, ROWS))
    weights = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda tokens: read_rows(tokens, places()), tokens)
    assert torch.autograd.gradcheck(lambda rows: sum_rows(rows, places()), rows)
    assert torch.autograd.gradcheck(lambda rows, weights: sum_weighted_rows(rows, weights, places()), (rows, weights))


def test_undefined_rows_behind_the_used_ones_change_nothing():
    """Rows for ranks fill up to a number that is known in advance; their last ones never arrive."""
    whole = sort_some_by_choice(CHOSEN, 3)
    rows = torch.randn(9, 4)
    rows[ROWS:] = torch.nan
    assert torch.equal(sum_rows(rows, whole), sum_rows(rows[:ROWS], places()))
    tokens = torch.randn(3, 4, requires_grad=True)
    read_rows(tokens, whole).backward(rows)
    assert tokens.grad is not None and tokens.grad.isfinite().all()


def test_sums_of_bf16_are_rounded_once():
    """256 and 1, added in bf16, are 256."""
    rows, chosen = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16(), torch.tensor([[0, 1, 2]])
    assert sum_rows(rows, sort_by_choice(chosen, 3)).item() == 258


def test_a_few_rows_have_the_values_and_gradients_of_all():
    (order, _, _), used = places(), (CHOSEN < 3)[..., None]
    tokens, token = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), order // 3
    rows = read_few_rows(tokens, token)
    assert torch.equal(rows, read_rows(tokens, places()))
    torch.testing.assert_close(sum_few_rows(rows, token, 3), (tokens[:, None] * used).sum(1))
    assert torch.autograd.gradcheck(lambda tokens: read_few_rows(tokens, token), tokens)
    assert torch.autograd.gradcheck(lambda rows: sum_few_rows(rows, token, 3), rows.detach().requires_grad_())


def test_the_gradient_of_a_few_rows_is_rounded_once():
    token, tokens = torch.zeros(3, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    read_few_rows(tokens, token).backward(torch.tensor([[256.0], [1.0], [1.0]]).bfloat16())
    assert tokens.grad is not None and tokens.grad.item() == 258


def test_several_threads_sum_a_few_rows_in_the_same_order():
    rows, token = torch.randn(16_000, 64), torch.rand(16_000).argsort() // 8
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = sum_few_rows(rows, token, 2000)
        torch.set_num_threads(4)
        assert all(torch.equal(sum_few_rows(rows, token, 2000), expected) for _ in range(5))
    finally:
        torch.set_num_threads(before)
