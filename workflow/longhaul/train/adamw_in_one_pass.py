"""Applies AdamW on GPUs under ZeRO 1 to 3 in one kernel: clipping, update, moments and the rounding to bf16.

It keeps the state of torch.optim.AdamW under the same names, so checkpoints do not depend on which of the two has run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from longhaul.train.compile_reproducibly import compile_reproducibly


def is_compiled(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether this optimizer is an AdamW on GPUs whose kernel the trainer may compile."""
    on_gpus = all(parameter.is_cuda for group in optimizer.param_groups for parameter in group["params"])
    return isinstance(optimizer, torch.optim.AdamW) and on_gpus and os.environ.get("TORCHDYNAMO_DISABLE") != "1"


@torch.no_grad()
def adamw_in_one_pass(
    settings: Mapping[str, Any],
    state: dict[str, torch.Tensor],
    master: torch.Tensor,
    gradient: torch.Tensor,
    weights: torch.Tensor,
    divisor: torch.Tensor | None,
    is_bad: torch.Tensor,
) -> None:
    """Update flat master weights, and round them into `weights`. Decoupled weight decay, arXiv:1711.05101.

    settings: the optimizer's parameter group
    state:    of torch.optim.AdamW for `master`; empty before the first step
    gradient: in any precision
    divisor:  of the gradient, a scalar; None divides by nothing
    is_bad:   a scalar; 1 leaves everything as it is, also the number of steps
    """
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
    state["step"] += 1.0 - is_bad
    numbers = _numbers(settings, state["step"].double(), divisor, is_bad)
    update = _compiled_update() if master.is_cuda else _update
    update(master, state["exp_avg"], state["exp_avg_sq"], gradient, weights, numbers)


def _numbers(
    settings: Mapping[str, Any], step: torch.Tensor, divisor: torch.Tensor | None, is_bad: torch.Tensor
) -> torch.Tensor:
    """Return the numbers that `_update` unpacks, in fp32 on the device: a compiler would compile a new kernel for a new float."""
    (beta1, beta2), lr = settings["betas"], settings["lr"]
    step_size, root = lr / (1.0 - beta1**step), (1.0 - beta2**step).sqrt()
    constants = (1.0 - lr * settings["weight_decay"], 1.0 - beta1, beta2, 1.0 - beta2, settings["eps"])
    filled = [torch.full_like(is_bad, constant) for constant in constants]
    return torch.stack(
        [torch.ones_like(is_bad) if divisor is None else divisor, is_bad, step_size.float(), root.float(), *filled]
    )


@cache
def _compiled_update() -> Callable[..., None]:
    return compile_reproducibly(_update)


def _update(
    master: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    gradient: torch.Tensor,
    weights: torch.Tensor,
    numbers: torch.Tensor,
) -> None:
    divisor, is_bad, step_size, root, decay, rest1, beta2, rest2, eps = numbers.unbind()
    clipped = gradient.float() / divisor
    new_mean = mean + (clipped - mean) * rest1
    new_square = square * beta2 + clipped * clipped * rest2
    new_master = master * decay - step_size * new_mean / (new_square.sqrt() / root + eps)
    is_good = is_bad == 0.0
    new_master = torch.where(is_good, new_master, master)
    mean.copy_(torch.where(is_good, new_mean, mean))
    square.copy_(torch.where(is_good, new_square, square))
    master.copy_(new_master)
    weights.copy_(new_master)
