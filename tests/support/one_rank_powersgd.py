"""What the low-rank reduction makes of one rank's gradients; survival/test_compressed_gradients.py trains with it on several.

Run by test_powersgd.py in a process of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longhaul.config.run_config import PowerSgd
from longhaul.train.powersgd import LowRankReduction, _in_buckets, _matrices, compress_reduction
from tests.support.small_configs import plan_of

RANK, START = 2, 2


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def low_rank(*shape: int) -> torch.Tensor:
    """Matrices of rank RANK."""
    *batch, rows, columns = shape
    return torch.randn(*batch, rows, RANK) @ torch.randn(*batch, RANK, columns)


def module(*gradients: torch.Tensor) -> Any:
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return torch.nn.ParameterList(parameters)


def reduction(model: Any, elements: int = 10**6) -> LowRankReduction:
    engine = SimpleNamespace(module=model, optimizer=None, zero_optimization_stage=lambda: 0)
    made = LowRankReduction(engine, PowerSgd(rank=RANK, start_step=START), elements)
    made._state.iter = START
    return made


def test_matrices_of_that_rank_and_vectors_come_back_as_they_were():
    """Experts in one tensor too: each is a matrix of its own, else no rank 2 could hold them."""
    gradients = [low_rank(32, 48), torch.randn(64), low_rank(3, 24, 40)]
    model = module(*gradients)
    made = reduction(model)
    made.reduce()
    for parameter, gradient in zip(model, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-3)
    assert made._state.error_dict[0].abs().max() < 1e-3


def test_what_is_lost_is_added_to_the_next_step():
    gradient = torch.randn(32, 48)
    model = module(gradient)
    made = reduction(model)
    made.reduce()
    lost = gradient - model[0].grad
    assert lost.abs().max() > 0.1
    torch.testing.assert_close(made.state()["error_dict"][0].view(32, 48), lost)
    model[0].grad = torch.zeros(32, 48)
    made.finish_step(was_refused=False)
    made.reduce()
    torch.testing.assert_close(made.state()["error_dict"][0].view(32, 48), lost - model[0].grad)
    assert model[0].grad.any()


def test_a_refused_step_leaves_the_state_as_it_was():
    model = module(torch.randn(32, 48))
    made = reduction(model)
    for gradient in (torch.randn(32, 48), torch.full((32, 48), float("nan"))):
        before = {name: value for name, value in made.state().items() if name != "iter"}
        copies = {name: {0: value[0].clone()} for name, value in before.items() if value}
        model[0].grad = gradient
        made.reduce()
        made.finish_step(was_refused=bool(gradient.isnan().any()))
    assert made.state()["iter"] == START + 1
    for name, value in copies.items():
        assert torch.equal(made.state()[name][0], value[0]) and not value[0].isnan().any()


def test_a_parameter_without_gradient_counts_as_zeros():
    model = module(torch.randn(8))
    model[0].grad = None
    reduction(model).reduce()
    assert torch.equal(model[0].grad, torch.zeros(8))


def test_another_number_of_ranks_shares_what_all_of_them_lost():
    model = module(torch.randn(32, 48), torch.randn(16, 64))
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        for parameter in model:
            parameter.grad = torch.randn_like(parameter)
        made = reduction(model, elements=1600)
        made.reduce()
        states.append({**made.state(), "error_dict": {k: v.clone() for k, v in made.state()["error_dict"].items()}})
    means = {place: sum(state["error_dict"][place] for state in states) / 3 for place in (0, 1)}
    made.load(iter(states))
    assert made.state()["iter"] == states[0]["iter"]
    for place, mean in means.items():
        torch.testing.assert_close(made.state()["error_dict"][place], mean)


def test_buckets_hold_all_that_is_trained_in_order():
    parameters = [torch.nn.Parameter(torch.zeros(size), requires_grad=size != 5) for size in (4, 5, 6, 20, 3, 3, 3)]
    sizes = [[p.numel() for p in members] for members in _in_buckets(parameters, 10)]
    assert sizes == [[4, 6], [20], [3, 3, 3]]
    assert _matrices(torch.Size((3, 4, 5))) == [torch.Size((4, 5))] * 3


def test_a_stage_goes_on_with_another_bucket_size():
    gradients = [torch.randn(32, 48), torch.randn(16, 64)]

    def engine_of(bucket_size: int | None) -> tuple[Any, LowRankReduction]:
        engine = SimpleNamespace(module=module(*gradients), optimizer=None, zero_optimization_stage=lambda: 0)
        powersgd = PowerSgd(rank=RANK, start_step=START)
        stage = SimpleNamespace(
            communication=SimpleNamespace(powersgd=powersgd), zero=SimpleNamespace(reduce_bucket_size=bucket_size)
        )
        made = compress_reduction(engine, SimpleNamespace(stage=stage))  # pyright: ignore[reportArgumentType]
        assert made is engine.low_rank
        return engine, made

    def second_step(bucket_size: int | None) -> list[torch.Tensor]:
        engine, made = engine_of(bucket_size)
        made.load([copy.deepcopy(saved)])
        made.reduce()
        return [parameter.grad for parameter in engine.module]

    _, made = engine_of(1600)
    made._state.iter = START
    made.reduce()
    saved = made.state()
    assert saved["error_dict"]
    for found, wanted in zip(second_step(None), second_step(1600), strict=True):
        assert torch.equal(found, wanted)


def test_the_plan_counts_its_memory(tmp_path: Path):
    """Twice 4 bytes a parameter for what is lost, before and after a step, and a bucket with its copy, here of all."""

    def buckets(**communication: Any) -> int:
        keys = {"stages.0.gpus_per_node": 2, "stages.0.zero": {"stage": 1, "reduce_bucket_size": 1000}}
        memory = plan_of(tmp_path, keys | {"stages.0.communication": communication}).stages[0].memory
        assert memory
        return memory.buckets

    assert buckets(powersgd={}) == 16 * plan_of(tmp_path).stages[0].memory.weights // 4  # pyright: ignore
    assert buckets() == 2 * 4 * 1000
