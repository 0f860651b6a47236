"""PowerSGD on one rank's gradients; recovery/test_compressed_gradients.py trains with it on several ranks.

tests/unit/train/test_powersgd.py runs this file in a process of its own.
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

from longhaul.config.communication_config import PowerSgd
from longhaul.train.powersgd import PowerSgdReducer, _in_buckets, _matrices, install_powersgd
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
    """Return matrices of rank RANK."""
    *batch, rows, columns = shape
    return torch.randn(*batch, rows, RANK) @ torch.randn(*batch, RANK, columns)


def module(*gradients: torch.Tensor) -> Any:
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return torch.nn.ParameterList(parameters)


def reducer_of(model: Any, elements: int = 10**6) -> PowerSgdReducer:
    engine = SimpleNamespace(module=model, optimizer=None, zero_optimization_stage=lambda: 0)
    reducer = PowerSgdReducer(engine, PowerSgd(rank=RANK, start_step=START), elements)
    reducer._state.iter = START
    return reducer


def test_matrices_of_low_rank_and_vectors_are_unchanged():
    """So are experts in one tensor: each is a matrix of its own; as one matrix they would have a higher rank."""
    gradients = [low_rank(32, 48), torch.randn(64), low_rank(3, 24, 40)]
    model = module(*gradients)
    reducer = reducer_of(model)
    reducer.reduce()
    for parameter, gradient in zip(model, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-3)
    assert reducer._state.error_dict[0].abs().max() < 1e-3


def test_the_compression_error_is_added_to_the_next_step():
    gradient = torch.randn(32, 48)
    model = module(gradient)
    reducer = reducer_of(model)
    reducer.reduce()
    lost = gradient - model[0].grad
    assert lost.abs().max() > 0.1
    torch.testing.assert_close(reducer.state()["error_dict"][0].view(32, 48), lost)
    model[0].grad = torch.zeros(32, 48)
    reducer.finish_step(was_bad=False)
    reducer.reduce()
    torch.testing.assert_close(reducer.state()["error_dict"][0].view(32, 48), lost - model[0].grad)
    assert model[0].grad.any()


def test_a_bad_step_leaves_the_state_unchanged():
    model = module(torch.randn(32, 48))
    reducer = reducer_of(model)
    for gradient in (torch.randn(32, 48), torch.full((32, 48), float("nan"))):
        before = {name: value for name, value in reducer.state().items() if name != "iter"}
        copies = {name: {0: value[0].clone()} for name, value in before.items() if value}
        model[0].grad = gradient
        reducer.reduce()
        reducer.finish_step(was_bad=bool(gradient.isnan().any()))
    assert reducer.state()["iter"] == START + 1
    for name, value in copies.items():
        assert torch.equal(reducer.state()[name][0], value[0]) and not value[0].isnan().any()


def test_a_parameter_without_gradient_counts_as_zeros():
    model = module(torch.randn(8))
    model[0].grad = None
    reducer_of(model).reduce()
    assert torch.equal(model[0].grad, torch.zeros(8))


def test_another_number_of_ranks_gets_the_mean_compression_error():
    model = module(torch.randn(32, 48), torch.randn(16, 64))
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        for parameter in model:
            parameter.grad = torch.randn_like(parameter)
        reducer = reducer_of(model, elements=1600)
        reducer.reduce()
        states.append(
            {**reducer.state(), "error_dict": {k: v.clone() for k, v in reducer.state()["error_dict"].items()}}
        )
    means = {place: sum(state["error_dict"][place] for state in states) / 3 for place in (0, 1)}
    reducer.load(iter(states))
    assert reducer.state()["iter"] == states[0]["iter"]
    for place, mean in means.items():
        torch.testing.assert_close(reducer.state()["error_dict"][place], mean)


def test_buckets_contain_all_trained_parameters_in_order():
    parameters = [torch.nn.Parameter(torch.zeros(size), requires_grad=size != 5) for size in (4, 5, 6, 20, 3, 3, 3)]
    sizes = [[p.numel() for p in members] for members in _in_buckets(parameters, 10)]
    assert sizes == [[4, 6], [20], [3, 3, 3]]
    assert _matrices(torch.Size((3, 4, 5))) == [torch.Size((4, 5))] * 3


def test_a_stage_resumes_with_another_bucket_size():
    gradients = [torch.randn(32, 48), torch.randn(16, 64)]

    def engine_of(bucket_size: int | None) -> tuple[Any, PowerSgdReducer]:
        engine = SimpleNamespace(module=module(*gradients), optimizer=None, zero_optimization_stage=lambda: 0)
        powersgd = PowerSgd(rank=RANK, start_step=START)
        stage = SimpleNamespace(
            communication=SimpleNamespace(powersgd=powersgd), zero=SimpleNamespace(reduce_bucket_size=bucket_size)
        )
        reducer = install_powersgd(engine, SimpleNamespace(stage=stage))  # pyright: ignore[reportArgumentType]
        assert reducer is engine.powersgd
        return engine, reducer

    def second_step(bucket_size: int | None) -> list[torch.Tensor]:
        engine, reducer = engine_of(bucket_size)
        reducer.load([copy.deepcopy(saved)])
        reducer.reduce()
        return [parameter.grad for parameter in engine.module]

    _, reducer = engine_of(1600)
    reducer._state.iter = START
    reducer.reduce()
    saved = reducer.state()
    assert saved["error_dict"]
    for found, expected in zip(second_step(None), second_step(1600), strict=True):
        assert torch.equal(found, expected)


def test_the_memory_plan_includes_powersgd(tmp_path: Path):
    """Twice 4 bytes per parameter for the error before and after a step, and a bucket with its copy, here of all parameters."""

    def buckets(**communication: Any) -> int:
        keys = {"stages.0.gpus_per_node": 2, "stages.0.zero": {"stage": 1, "reduce_bucket_size": 1000}}
        memory = plan_of(tmp_path, keys | {"stages.0.communication": communication}).stages[0].memory
        assert memory
        return memory.gradient_buckets

    assert buckets(powersgd={}) == 16 * plan_of(tmp_path).stages[0].memory.weights // 4  # pyright: ignore
    assert buckets() == 2 * 4 * 1000
