"""gather_whole_tensors compares replicated tensors at every save. Here the ranks are threads, without DeepSpeed."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longhaul.config.stage_config import Parallel
from longhaul.train.parallel import gather_to_rank0
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.sliced_parameters import slice_parameter

RANKS = 2


class ThreadRanks:
    """Threads that act as ranks and exchange values at a barrier."""

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel
        self.values: list[Any] = [None] * RANKS
        self.barrier = Barrier(RANKS, timeout=30)

    def context(self, rank: int) -> Any:
        """Return what the code under test uses of a DistributedContext."""

        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        dims = ParallelDims(rank, RANKS, self.parallel)
        own = SimpleNamespace(rank=rank)
        return SimpleNamespace(rank=own, is_main=rank == 0, dims=dims, gather=gather, device=torch.device("cpu"))


def gathered_names(models: list[torch.nn.Module], zero: int = 0, parallel: Parallel | None = None) -> list[str]:
    """Return the names that rank 0 gets if rank i gathers models[i]."""
    ranks = ThreadRanks(parallel or Parallel())

    def gather_on(rank: int) -> list[str]:
        engine = SimpleNamespace(module=models[rank], zero_optimization_stage=lambda: zero)
        return [name for name, _, _ in gather_to_rank0.gather_whole_tensors(engine, ranks.context(rank))]

    with ThreadPoolExecutor(RANKS) as pool:
        names, _ = pool.map(gather_on, range(RANKS))
        return names


def equal_models(build: Callable[[], torch.nn.Module] = lambda: torch.nn.BatchNorm1d(4)) -> list[torch.nn.Module]:
    """Return one equal model for each rank; by default with the parameters weight and bias, and with buffers."""
    return [build() for _ in range(RANKS)]


def change_last_element(model: torch.nn.Module, name: str) -> None:
    with torch.no_grad():
        model.state_dict()[name].flatten()[-1] += 2**-20


def replace_deepspeed_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.utils.safe_get_full_fp32_param", lambda parameter: parameter.detach())


def test_equal_replicas_are_accepted() -> None:
    assert gathered_names(equal_models())[:2] == ["weight", "bias"]


@pytest.mark.parametrize(
    ("zero", "parallel", "name"),
    [
        (0, Parallel(), "bias"),
        (1, Parallel(tensor=2), "weight"),
        (1, Parallel(), "running_mean"),
        (3, Parallel(expert=2), "bias"),
    ],
    ids=["ZeRO 0", "tensor ranks", "buffers", "expert ranks"],
)
def test_different_replicas_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, zero: int, parallel: Parallel, name: str
) -> None:
    replace_deepspeed_gather(monkeypatch)
    models = equal_models()
    change_last_element(models[1], name)
    message = f"ranks 0 and 1 hold different values of {name}: its gradient was not summed over them"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        gathered_names(models, zero, parallel)


def test_different_slices_of_a_tensor_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_deepspeed_gather(monkeypatch)
    monkeypatch.setattr(gather_to_rank0, "_receive_whole", lambda shape, *_: torch.empty(shape))
    monkeypatch.setattr(gather_to_rank0.dist, "send", lambda value, rank: None)
    models = equal_models(lambda: torch.nn.Linear(3, 4, bias=False))
    for rank, model in enumerate(models):
        parameter = slice_parameter(model, "weight", {0: ((2 * rank, 2 * rank + 2),)})
        torch.nn.init.constant_(parameter, rank)
    assert gathered_names(models, 1, Parallel(tensor=2)) == ["weight"]


def test_only_tensors_that_ranks_hold_independently_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that ZeRO gathers is equal on all ranks; hashing it on each would take longer than gathering it."""
    replace_deepspeed_gather(monkeypatch)
    hashed: list[int] = []
    monkeypatch.setattr(gather_to_rank0, "tensor_sha256", lambda value: hashed.append(value.numel()) or "")
    linear = lambda: torch.nn.Linear(3, 4)  # noqa: E731 (twelve weights, four biases)
    gathered_names(equal_models(linear), 1)
    assert hashed == []
    gathered_names(equal_models(linear), 1, Parallel(tensor=2))
    assert sorted(hashed) == [4, 4, 12, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_the_hash_covers_the_elements_in_order(dtype: torch.dtype) -> None:
    value = torch.arange(12).view(3, 4).to(dtype)
    tensor_sha256 = gather_to_rank0.tensor_sha256
    assert tensor_sha256(value.T) == tensor_sha256(value.T.contiguous())
    assert tensor_sha256(value.T) != tensor_sha256(~(value > 5))
    assert tensor_sha256(value[0, 0]) == tensor_sha256(value[:1, :1])
