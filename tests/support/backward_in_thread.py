"""Runs a backward pass in a thread of its own, as autograd does on a GPU; on a CPU it would use the thread that asks for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def backward_in_thread(loss: torch.Tensor) -> None:
    """Compute the gradients of a scalar; raise what the backward pass raises."""
    with ThreadPoolExecutor(1) as threads:
        threads.submit(loss.backward).result()
