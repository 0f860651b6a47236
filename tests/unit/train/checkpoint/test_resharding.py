"""Adam's new state for a checkpoint of another layout is the state that torch itself makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longhaul.checkpoint_io import OptimizerState
from longhaul.train.checkpoint.resharding import new_adam_state

STEPS = 3


def adamw(device: str, **options: Any) -> tuple[torch.optim.AdamW, torch.nn.Parameter]:
    flat = torch.nn.Parameter(torch.linspace(-1, 1, 64, device=device))
    return torch.optim.AdamW([flat], lr=0.1, **options), flat


@pytest.mark.parametrize("option", ["fused", "capturable"])
def test_the_step_count_is_on_the_device_where_a_kernel_reads_it(option: str):
    """The device meta takes the place of a GPU."""
    for options, device in (({option: True}, "meta"), ({}, "cpu")):
        adam, flat = adamw("meta", **options)
        state = new_adam_state(adam, flat, OptimizerState(STEPS, {"exp_avg": {}, "exp_avg_sq": {}}))
        assert (state["step"].device.type, state["step"].dtype) == (device, torch.float32)
        assert state["exp_avg"].device.type == "meta"


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=["plain", "fused", "foreach"])
def test_training_continues_with_the_same_bits(options: dict[str, Any]):
    whole, flat = adamw("cpu", **options)
    for step in range(2 * STEPS):
        if step == STEPS:
            again, copied = adamw("cpu", **options)
            copied.data.copy_(flat)
            saved = whole.state[flat]
            state = new_adam_state(again, copied, OptimizerState(STEPS, {"exp_avg": {}, "exp_avg_sq": {}}))
            assert {k: (v.shape, v.dtype, v.device) for k, v in state.items()} == {
                k: (v.shape, v.dtype, v.device) for k, v in saved.items()
            }
            again.state[copied] = state
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(saved[key])
        flat.grad = torch.full_like(flat, 0.1 * (step + 1))
        whole.step()
        if step >= STEPS:
            copied.grad = flat.grad.clone()
            again.step()
    assert torch.equal(flat, copied)
