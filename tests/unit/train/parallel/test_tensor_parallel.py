"""Layers of tensor parallelism that need no other ranks; tests/parity compares their results."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.autograd.graph import saved_tensors_hooks

from longhaul.train.parallel import tensor_parallel
from longhaul.train.parallel.tensor_parallel import RowParallelLinear


@pytest.mark.parametrize("with_bias", [False, True])
def test_zero_3_keeps_no_gathered_weight_of_a_row_parallel_layer(monkeypatch: pytest.MonkeyPatch, with_bias: bool):
    """DeepSpeed replaces F.linear when the layers of tensor parallelism exist already."""
    weight = torch.nn.Parameter(torch.randn(8, 4))
    layer = RowParallelLinear(weight, torch.nn.Parameter(torch.ones(8)) if with_bias else None, "")
    monkeypatch.setattr(tensor_parallel, "sum_over_group", lambda tensor, _group: tensor)
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(2, 3, 4, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = layer(x)
    in_weight = [
        tensor for tensor in kept if tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    ]
    assert in_weight and all(tensor.shape == weight.shape for tensor in in_weight), "a transposed view is kept"
    assert torch.allclose(outputs, x @ weight.T + (1 if with_bias else 0), atol=1e-6)
