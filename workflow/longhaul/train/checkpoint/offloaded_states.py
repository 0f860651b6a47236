"""Optimizer states that lie on a disk (ZeRO-Infinity), in reach for a save or a load.

DeepSpeed keeps masters and moments of each large sub-group in a file of their own, and has them in memory while it
updates that group alone. Its checkpoints copy those files, and lose what was too small to be swapped and Adam's count of
steps. Here the files are mapped instead: for the length of a block every state is a tensor whose pages come and go, so
that all that saves, loads or gathers states in memory does the same to these, and the checkpoint is like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def states_in_reach(engine: Any, writable: bool = False) -> Iterator[None]:
    """For the block, masters and moments are in their tensors, and DeepSpeed takes them for states in memory.

    writable: what is written to them is written to the disk. Nothing is done where no states are swapped.
    """
    optimizer = engine.optimizer
    if not getattr(optimizer, "swap_optimizer", False):
        yield
        return
    infos = optimizer.optimizer_swapper.swap_params_info.values()
    for info in infos:
        for state in info.tensors:
            _map(state, info.numel(), writable)
    optimizer.swap_optimizer = False
    try:
        yield
    finally:
        optimizer.swap_optimizer = True
        for info in infos:
            info.release_memory()


def forget_moments(engine: Any) -> None:
    """As after its construction, the optimizer has masters alone."""
    optimizer = engine.optimizer
    if swapper := getattr(optimizer, "optimizer_swapper", None):
        swapper.purge_state()
    adam = optimizer.optimizer if engine.zero_optimization_stage() else optimizer
    adam.state.clear()


def zero_moment(swapper: Any, flat: Any, name: str) -> torch.Tensor:
    """Zeros of the shape of the optimizer's tensor `flat`: in memory, or in a file where DeepSpeed's `swapper` has `flat` in one.

    The file is there until `states_in_reach`, inside which this is called, ends; then it is DeepSpeed's.
    """
    info = swapper.swap_params_info.get(flat.ds_id) if swapper else None
    if info is None:
        return torch.zeros_like(flat)
    moment: Any = torch.empty(0, dtype=flat.dtype)
    moment.ds_id = f"{name}-{flat.ds_id}"  # as OptimizerSwapper._get_state_tensors has it
    info.add_state_tensors([moment])
    state = info.tensors[-1]
    with Path(state.swap_path).open("wb") as file:
        # The swapper reads and writes whole blocks.
        file.truncate(swapper._io_aligned_numel(info.numel()) * flat.element_size())
    _map(state, info.numel(), writable=True)
    return moment


def _map(state: Any, numel: int, writable: bool) -> None:
    tensor = state.compute_tensor
    tensor.data = torch.from_file(state.swap_path, shared=writable, size=numel, dtype=tensor.dtype)
