"""Runs a backward pass in a thread of its own, as autograd does on a GPU; on a CPU it would use the thread that asks for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def backward_in_thread(backward: Callable[[], object]) -> None:
    """Call a function that computes gradients, for example `loss.backward`; raise what it raises."""
    with ThreadPoolExecutor(1) as threads:
        threads.submit(backward).result()
