"""What ranks hold each for itself is compared at every save; here the ranks are threads, without DeepSpeed."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longhaul.config.run_config import Parallel
from longhaul.train.parallel import gather_weights as gathering
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.tensor_slices import shard_parameter

RANKS = 2


class Ranks:
    """Threads that meet to tell each other their values."""

    def __init__(self, parallel: Parallel) -> None:
        self.parallel, self.told = parallel, [None] * RANKS
        self.barrier = Barrier(RANKS, timeout=30)

    def processes(self, rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            self.told[rank] = value
            self.barrier.wait()
            found = list(self.told)
            self.barrier.wait()
            return found

        dims = ParallelDims(rank, RANKS, self.parallel)
        own = SimpleNamespace(rank=rank)
        return SimpleNamespace(rank=own, is_main=rank == 0, dims=dims, gather=gather, device=torch.device("cpu"))


def gathered(models: list[torch.nn.Module], zero: int = 0, parallel: Parallel | None = None) -> list[str]:
    """The names that rank 0 is given when each rank gathers its own model."""
    ranks = Ranks(parallel or Parallel())

    def run(rank: int) -> list[str]:
        engine = SimpleNamespace(module=models[rank], zero_optimization_stage=lambda: zero)
        return [name for name, _, _ in gathering.whole_tensors(engine, ranks.processes(rank))]

    with ThreadPoolExecutor(RANKS) as pool:
        names, _ = pool.map(run, range(RANKS))
        return names


def models(make: Callable[[], torch.nn.Module] = lambda: torch.nn.BatchNorm1d(4)) -> list[torch.nn.Module]:
    """Alike on all ranks; with the parameters weight and bias, and buffers."""
    return [make() for _ in range(RANKS)]


def spoil(model: torch.nn.Module, name: str) -> None:
    with torch.no_grad():
        model.state_dict()[name].flatten()[-1] += 2**-20


def gather_by_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.utils.safe_get_full_fp32_param", lambda parameter: parameter.detach())


def test_replicas_that_are_alike_are_taken() -> None:
    assert gathered(models())[:2] == ["weight", "bias"]


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
def test_replicas_that_differ_are_named(
    monkeypatch: pytest.MonkeyPatch, zero: int, parallel: Parallel, name: str
) -> None:
    gather_by_deepspeed(monkeypatch)
    differing = models()
    spoil(differing[1], name)
    says = f"ranks 0 and 1 hold {name} with different values: a gradient is not summed"
    with pytest.raises(RuntimeError, match=re.escape(says)):
        gathered(differing, zero, parallel)


def test_different_parts_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor that is cut, each rank's own half."""
    gather_by_deepspeed(monkeypatch)
    monkeypatch.setattr(gathering, "_collect", lambda shape, *_: torch.empty(shape))
    monkeypatch.setattr(gathering.dist, "send", lambda value, rank: None)
    halves = models(lambda: torch.nn.Linear(3, 4, bias=False))
    for rank, model in enumerate(halves):
        parameter = shard_parameter(model, "weight", {0: ((2 * rank, 2 * rank + 2),)})
        torch.nn.init.constant_(parameter, rank)
    assert gathered(halves, 1, Parallel(tensor=2)) == ["weight"]


def test_what_zero_gathers_is_hashed_by_the_proof_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same on all ranks; hashing it on each would take longer than gathering it."""
    gather_by_deepspeed(monkeypatch)
    hashed: list[int] = []
    monkeypatch.setattr(gathering, "sha256", lambda value: hashed.append(value.numel()) or "")
    linear = lambda: torch.nn.Linear(3, 4)  # noqa: E731 (twelve weights, four biases)
    gathered(models(linear), 1)
    assert hashed == []
    gathered(models(linear), 1, Parallel(tensor=2))
    assert sorted(hashed) == [4, 4, 12, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_hash_is_that_of_the_bytes(dtype: torch.dtype) -> None:
    value = torch.arange(12).view(3, 4).to(dtype)
    assert gathering.sha256(value.T) == gathering.sha256(value.T.contiguous()) != gathering.sha256(~(value > 5))
    assert gathering.sha256(value[0, 0]) == gathering.sha256(value[:1, :1])
