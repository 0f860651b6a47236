"""Experts that ranks divide, compared with the undivided module; what is sent, in which order, and where the CPU waits."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longhaul.train.compile_layers import compile_part
from longhaul.train.parallel import expert_parallel
from tests.support import expert_exchange_worker
from tests.support.expert_exchange_worker import CASES, EXPERTS, TOKENS
from tests.support.launch_ranks import launch_worker
from tests.unit.train.test_waits_for_the_gpu import WaitingOperators


@cache
def output_of(ranks: int) -> str:
    worker = Path(expert_exchange_worker.__file__)
    done = launch_worker(worker, ranks, environment={"TORCHDYNAMO_DISABLE": "0"}, timeout_s=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def results_of(ranks: int) -> dict[str, tuple[float, list[list[int]]]]:
    lines = re.findall(r"^EXPERTS (.*): (\S+) \[\[(.*)\]\]$", output_of(ranks), re.MULTILINE)
    return {
        name: (float(difference), [[int(n) for n in rank.split(", ") if n] for rank in rows.split("], [")])
        for name, difference, rows in lines
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_gradients_are_those_of_the_undivided_experts(ranks: int):
    results = results_of(ranks)
    assert list(results) == [f"{name}, {kind}" for name in CASES for kind in ("eager", "captured", "recomputed")]
    assert all(difference <= 2e-6 for difference, _ in results.values()), results


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_token_is_sent_once_to_each_rank_with_experts_of_it(name: str, ranks: int):
    """Both passes send the rows there, and those of the sums back."""
    _, rows = results_of(ranks)[f"{name}, eager"]
    pairs = [
        {
            (token, expert * ranks // EXPERTS)
            for token, row in enumerate(CASES[name](rank, ranks).tolist())
            for expert in row
        }
        for rank in range(ranks)
    ]
    for rank, sizes in enumerate(rows):
        there = len(pairs[rank])
        back = sum(to_rank == rank for sent in pairs for _, to_rank in sent)
        assert sizes == [there, back, there, back]
        if name == "every expert":
            assert there == TOKENS * ranks < TOKENS * EXPERTS


@pytest.mark.parametrize("ranks", [2, 4])
def test_shared_experts_are_computed_while_rows_are_under_way(ranks: int):
    output = output_of(ranks)
    order = dict(re.findall(r"^ORDER (.*): (.*)$", output, re.MULTILINE))
    # Choices and rows, shared experts, their arrival; sums. Backwards: sums; rows and choices, shared experts, their arrival.
    assert order["forward"] == "start start shared wait wait start wait"
    assert order["backward"] == "start wait start start shared wait wait"
    (difference,) = re.findall(r"^SHARED (.*)$", output, re.MULTILINE)
    assert float(difference) <= 2e-6


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_rows_that_were_sent_are_freed_when_they_arrived(one_rank: None):
    """The memory plan counts the rows of one exchange: those that are sent, and those that arrive."""
    divided = expert_exchange_worker.divide(expert_exchange_worker.build_mixture("qwen3_moe").experts, False)
    parts, sent, alive = divided.parts, list[weakref.ref[torch.Tensor]](), list[bool]()

    def make_rows(*arguments: Any) -> Any:
        rows = parts.make_rows(*arguments)
        sent.extend(weakref.ref(tensor) for tensor in rows)
        return rows

    def read_for_experts(*arguments: Any) -> torch.Tensor:
        alive.extend(tensor() is not None for tensor in sent)
        return parts.read_for_experts(*arguments)

    divided.parts = parts._replace(make_rows=make_rows, read_for_experts=read_for_experts)
    hidden = torch.randn(TOKENS, expert_exchange_worker.HIDDEN, requires_grad=True)
    divided(hidden, CASES["three choices"](0, 1), torch.rand(TOKENS, 3, requires_grad=True)).sum().backward()
    assert alive == [False, False]


def test_the_cpu_waits_for_the_counts_alone(one_rank: None, monkeypatch: pytest.MonkeyPatch):
    whole = expert_exchange_worker.build_mixture("qwen3_moe").experts
    divided = expert_exchange_worker.divide(whole, False)
    divided.local.forward = lambda rows, _index, _weights: rows * 2  # transformers' experts read on CPUs
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # nor what is compiled
    chosen, hidden = (
        CASES["three choices"](0, 1),
        torch.randn(TOKENS, expert_exchange_worker.HIDDEN, requires_grad=True),
    )
    with WaitingOperators() as found:
        divided(hidden, chosen, torch.rand(TOKENS, 3)).sum().backward()
    assert not found.names and hidden.grad is not None


def test_parts_have_two_graphs_at_most_for_any_number_of_rows(dynamo: Any):
    """The first one for the first number of rows, the second one for all others."""
    sort, read, add = (
        compile_part("aot_eager", part, None)
        for part in (
            expert_parallel._sort_by_expert,
            expert_parallel._read_for_experts,
            expert_parallel._sum_over_experts,
        )
    )
    for rows in (7, 52, 2, 30, 11):
        numbers = torch.rand(rows, EXPERTS).topk(3).indices
        pairs = int((numbers < 4).sum())
        choices = torch.cat([torch.rand(rows, 3), numbers], 1).requires_grad_()
        found: Any = sort(choices, pairs, 0, 4)
        arrived = torch.randn(rows, 16, requires_grad=True)
        add(read(arrived, found), found).sum().backward()  # pyright: ignore
        weights = (choices[:, :3] * (numbers < 4)).sum(1, keepdim=True)
        torch.testing.assert_close(arrived.grad, weights.expand_as(arrived).detach())
        assert choices.grad is not None and choices.grad.any()
    assert dynamo["stats"]["unique_graphs"] <= 6 and not dynamo["graph_break"]
