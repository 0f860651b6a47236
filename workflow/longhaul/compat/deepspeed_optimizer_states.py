"""Patches of DeepSpeed about the state of its optimizers: master weights of this rank, loss scaler, moments in files (offload).
Written for DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longhaul.compat.deepspeed import Engine, inner_optimizer

# Master weights and optimizer states


@dataclass(frozen=True)
class OwnedRange:
    """The elements of a parameter that this rank's optimizer updates.

    flat:   the optimizer's own tensor of master weights, a key of its `state`
    offset: where the elements begin in `flat`
    start:  where they begin in the flattened parameter
    numel:  their number; 0 where this rank owns none
    """

    flat: torch.Tensor
    offset: int
    start: int
    numel: int


def owned_range(engine: Engine, parameter: Any) -> OwnedRange | None:
    """Return which elements of the parameter this rank's optimizer owns; None where it owns none.

    DeepSpeed's own accessors (safe_get_full_fp32_param, safe_set_local_fp32_param) copy whole tensors and know no offsets.
    """
    optimizer, zero_stage = engine.optimizer, engine.zero_optimization_stage()
    if zero_stage == 0:  # the parameter is its own master weight
        return OwnedRange(parameter, 0, 0, parameter.numel())
    if zero_stage < 3:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
        return OwnedRange(flat, target.start, source.start, source.numel)
    group, offset, partition_numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = optimizer._get_param_partition_rank(parameter) * partition_numel
    numel = max(0, min(partition_numel, parameter.ds_numel - start))  # the last ranks' partitions are padded
    return OwnedRange(optimizer.fp32_partitioned_groups_flat[group], offset, start, numel)


def update_weights_from_masters(engine: Engine) -> None:
    """Copy the master weights into the weights that the model computes with. DeepSpeed does so only inside its own load."""
    optimizer, zero_stage = engine.optimizer, engine.zero_optimization_stage()
    if zero_stage in (1, 2):
        optimizer.update_lp_params()
    if zero_stage == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()


def replay_cpu_adam_steps(engine: Engine) -> None:
    """Give DeepSpeed's CPU Adam, after a load, the bias corrections of a run that was never interrupted.

    The op multiplies the powers of the betas from step to step, in fp32, and saves none of them. After a load it takes them
    from pow(), which rounds differently. Here it counts to the loaded step again, over empty tensors.

    Upstream: no issue about resuming is known; DeepSpeed issue 7819 is about the same powers within one step.
    """
    adam = inner_optimizer(engine)
    op = getattr(adam, "ds_opt_adam", None)
    if op is None:
        return
    group, empty = adam.param_groups[0], torch.empty(0)
    hyperparameters = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    op.destroy_adam(adam.opt_id)
    op.create_adam(adam.opt_id, *hyperparameters, adam.adam_w_mode, False)
    for step in range(1, max((state["step"] for state in adam.state.values()), default=0) + 1):
        op.adam_update(adam.opt_id, step, *hyperparameters, group["bias_correction"], empty, empty, empty, empty)


_LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scaler_state(engine: Engine) -> dict[str, float] | None:
    """Return the state of fp16's dynamic loss scaler; None where there is none. It depends on no parallel layout.

    The scaler has no state_dict; DeepSpeed pickles the whole object.
    """
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not hasattr(scaler, "last_overflow_iter"):
        return None
    return {name: getattr(scaler, name) for name in _LOSS_SCALER_FIELDS}


def restore_loss_scaler(engine: Engine, saved: dict[str, float] | None) -> None:
    """Set the dynamic loss scaler to a state that `loss_scaler_state` returned; None changes nothing."""
    for name, value in (saved or {}).items():
        setattr(engine.optimizer.loss_scaler, name, value)


# Optimizer states in files (ZeRO-Infinity)


@contextmanager
def mapped_optimizer_states(engine: Engine, writable: bool = False) -> Iterator[None]:
    """Map the files of swapped master weights and moments into their tensors for the length of the block.

    DeepSpeed keeps the states of each large sub-group in one file per tensor and reads them only while it updates that
    sub-group. Its own checkpoints copy those files, and lose the states that were too small to be swapped and Adam's number of
    steps. With mapped files, everything that saves, loads or gathers states in memory works, and the checkpoint has the usual
    form. Pages are read and written on demand, so the states never fill the memory.

    Upstream: DeepSpeed pull request 4416 and issue 7549 are about these checkpoints.

    writable: what the block writes to the states goes to the files. Without swapped states the block runs unchanged.
    """
    optimizer = engine.optimizer
    if not getattr(optimizer, "swap_optimizer", False):
        yield
        return
    infos = optimizer.optimizer_swapper.swap_params_info.values()
    for info in infos:
        for state in info.tensors:
            _map_file(state, info.numel(), writable)
    optimizer.swap_optimizer = False
    try:
        yield
    finally:
        optimizer.swap_optimizer = True
        for info in infos:
            info.release_memory()


def clear_adam_state(engine: Engine) -> None:
    """Remove moments and step counts: the optimizer holds only master weights, as after its construction.

    DeepSpeed has no public way to do so where the states are in files.
    """
    if swapper := getattr(engine.optimizer, "optimizer_swapper", None):
        swapper.purge_state()
    adam = engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer
    adam.state.clear()


def zero_moment(swapper: Any, flat: Any, name: str) -> torch.Tensor:
    """Return zeros of the shape of the optimizer's tensor `flat`; in a new file if `swapper` keeps `flat` in one, else in memory.

    DeepSpeed creates such a file only when it first writes the states of a sub-group.

    swapper: DeepSpeed's OptimizerSwapper, or None. The tensor is mapped until the enclosing `mapped_optimizer_states` ends; then
    the file belongs to DeepSpeed.
    """
    info = swapper.swap_params_info.get(flat.ds_id) if swapper else None
    if info is None:
        return torch.zeros_like(flat)
    moment: Any = torch.empty(0, dtype=flat.dtype)
    moment.ds_id = f"{name}-{flat.ds_id}"  # the name that OptimizerSwapper._get_state_tensors gives
    info.add_state_tensors([moment])
    state = info.tensors[-1]
    with Path(state.swap_path).open("wb") as file:
        # The swapper reads and writes whole blocks.
        file.truncate(swapper._io_aligned_numel(info.numel()) * flat.element_size())
    _map_file(state, info.numel(), writable=True)
    return moment


def _map_file(state: Any, numel: int, writable: bool) -> None:
    tensor = state.compute_tensor
    tensor.data = torch.from_file(state.swap_path, shared=writable, size=numel, dtype=tensor.dtype)
