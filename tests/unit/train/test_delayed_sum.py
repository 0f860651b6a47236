"""Sums that are read one call later on GPUs, and the save that counts its ranks with them."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longhaul.train.checkpoint.save_checkpoint import CheckpointSave
from longhaul.train.delayed_sum import DelayedSum


class Context:
    """Two ranks; the other one gives `other`."""

    def __init__(self, device: str) -> None:
        self.device, self.other, self.is_main = torch.device(device), 0.0, False
        self.rank = SimpleNamespace(world_size=2)

    def sums_on_device(self, values: list[float]) -> torch.Tensor:
        return torch.tensor([values[0] + self.other], dtype=torch.float64)

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


def test_a_gpu_gets_the_sum_of_the_call_before_and_a_cpu_its_own():
    for device, expected in (("cuda", [0.0, 11.0, 12.0]), ("cpu", [11.0, 12.0, 13.0])):
        context: Any = Context(device)
        context.other = 10.0
        sums = DelayedSum(context)
        assert [sums.next(own) for own in (1.0, 2.0, 3.0)] == expected


@pytest.mark.parametrize(("device", "calls"), [("cpu", 1), ("cuda", 2)])
def test_a_save_advances_when_all_ranks_gave_that_they_are_done(device: str, calls: int, tmp_path: Path):
    context: Any = Context(device)
    none: Any = None
    save = CheckpointSave(tmp_path, {"step": 3}, none, context, none, none, none)
    save._background.set_result(None)
    assert [save.advance() for _ in range(3)] == [False] * 3, "the other rank still writes"
    context.other = 1.0
    assert [save.advance() for _ in range(calls)] == [False] * calls
    assert save._is_publishing
    save._background = Future()  # this rank publishes; what it gave before does not count
    assert [save.advance() for _ in range(3)] == [False] * 3
    save._background.set_result(None)
    assert [save.advance() for _ in range(calls)] == [False] * (calls - 1) + [True]
