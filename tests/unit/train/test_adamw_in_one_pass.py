"""The update in one pass compared with torch.optim.AdamW, on a CPU and not compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longhaul.train.adamw_in_one_pass import adamw_in_one_pass, is_compiled

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
GOOD, BAD = torch.zeros(()), torch.ones(())


def parts() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    master = torch.randn(1000)
    return master, master.bfloat16()


@pytest.mark.parametrize("divisor", [None, 2.0])
def test_it_updates_as_torch_does(divisor: float | None):
    master, weights = parts()
    expected = torch.nn.Parameter(master.clone())
    adamw = torch.optim.AdamW([expected], **SETTINGS)
    state: dict[str, torch.Tensor] = {}
    for step in range(20):
        gradient = torch.randn(1000).bfloat16()
        adamw.param_groups[0]["lr"] = lr = SETTINGS["lr"] / (step + 1)  # pyright: ignore
        expected.grad = gradient.float() / (divisor or 1.0)
        adamw.step()
        scale = None if divisor is None else torch.tensor(divisor)
        adamw_in_one_pass({**SETTINGS, "lr": lr}, state, master, gradient, weights, scale, GOOD)
    torch.testing.assert_close(master, expected.data, rtol=1e-5, atol=1e-6)
    assert torch.equal(weights, master.bfloat16()) and not torch.equal(master, parts()[0])
    assert state.keys() == adamw.state[expected].keys()
    for name, value in adamw.state[expected].items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7)


def test_a_bad_step_changes_nothing():
    master, weights = parts()
    state: dict[str, torch.Tensor] = {}
    adamw_in_one_pass(SETTINGS, state, master, torch.ones(1000), weights, None, GOOD)
    before = [master.clone(), weights.clone(), *(value.clone() for value in state.values())]
    adamw_in_one_pass(SETTINGS, state, master, torch.full((1000,), torch.nan), weights, torch.tensor(torch.nan), BAD)
    assert all(torch.equal(a, b) for a, b in zip(before, [master, weights, *state.values()], strict=True))


def test_a_bad_first_step_changes_nothing_either():
    master, weights = parts()
    state: dict[str, torch.Tensor] = {}
    adamw_in_one_pass(SETTINGS, state, master, torch.ones(1000), weights, None, BAD)
    assert torch.equal(master, parts()[0]) and state["step"] == 0 and not state["exp_avg"].any()


def test_only_adamw_on_gpus_is_compiled():
    parameter: Any = torch.nn.Parameter(torch.ones(3))
    assert not is_compiled(torch.optim.AdamW([parameter])) and not is_compiled(torch.optim.SGD([parameter]))
