"""Compiles functions with torch.compile so that every rank and every attempt runs the same kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compile_reproducibly(
    function: Callable[..., Any], *, backend: str = "inductor", fullgraph: bool = True, dynamic: bool | None = False
) -> Callable[..., Any]:
    """Return torch.compile of the function; kernels are chosen without measuring them.

    A kernel that is chosen by its speed may add in another order than that of another rank or of the next attempt. Copies of
    a weight on tensor-parallel ranks would then differ, and a resumed training would not end with the same bits.

    The option is given with each function. torch sets the global one back after each graph (`use_deterministic_algorithms`,
    which Dynamo calls), and since torch 2.13 a global one does not reach the thread that compiles the backward pass on GPUs.
    """
    options: dict[str, Any] | None = {"deterministic": True} if backend == "inductor" else None
    return torch.compile(function, backend=backend, fullgraph=fullgraph, dynamic=dynamic, options=options)
