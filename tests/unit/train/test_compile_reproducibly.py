"""Every graph is compiled with kernels that are not measured, also the backward pass, which has a thread of its own on GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longhaul.train.compile_reproducibly import compile_reproducibly
from tests.support.backward_in_thread import backward_in_thread

pytestmark = pytest.mark.usefixtures("dynamo")


@pytest.fixture
def are_measured(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Collect for each compiled graph whether the compiler may choose its kernels by their speed."""
    import torch._inductor.config
    from torch._inductor.graph import GraphLowering

    found: list[bool] = []
    compile_graph = GraphLowering.compile_to_module

    def record(self: Any) -> Any:
        found.append(not torch._inductor.config.deterministic)
        return compile_graph(self)

    monkeypatch.setattr(GraphLowering, "compile_to_module", record)
    return found


def test_kernels_of_both_passes_are_chosen_without_measuring_them(are_measured: list[bool]) -> None:
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        loss = compile_reproducibly(torch.square)(torch.ones(4, requires_grad=True)).sum()
        backward_in_thread(loss.backward)
    assert are_measured == [False, False]


def test_torch_still_sets_the_global_option_back_after_a_graph() -> None:
    import torch._inductor.config

    with torch._inductor.config.patch(deterministic=True):
        torch.compile(torch.square, backend="eager")(torch.ones(4))
        assert not torch._inductor.config.deterministic
