"""Goes on from a checkpoint of another layout: another number of ranks, ZeRO stage, or split of the model.

DeepSpeed's own load wants the ranks that saved. Here every rank reads, tensor by tensor, the elements that its optimizer
owns of the masters and of Adam's moments, and writes them to where the optimizer keeps them. The numbers are those that
were saved; only sums over other ranks are rounded otherwise from then on.

The same way a stage in half precision gets the first masters that it was given, and not their rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longhaul.checkpoint_io import LazyTensor, OptimizerState, open_master_weights, open_optimizer_state
from longhaul.checkpoint_io.tensor_parts import Shard
from longhaul.errors import UserError
from longhaul.train.checkpoint.offloaded_states import forget_moments, states_in_reach, zero_moment
from longhaul.train.parallel.slice_model import parameters, saved_buffers

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Slot:
    """`numel` elements of a parameter that this rank's optimizer owns: from `start` of the parameter as this rank has it
    (its `shard` of the model's tensor), at `offset` of the optimizer's own tensor `flat`."""

    shard: Shard
    start: int
    numel: int
    flat: torch.Tensor
    offset: int

    def write(self, target: torch.Tensor, source: LazyTensor) -> None:
        """target: `flat` itself, or a moment of its shape."""
        self._put(target, self.shard.read_range(source, self.start, self.start + self.numel))

    def write_part(self, values: torch.Tensor) -> None:
        """values: of the whole parameter as this rank has it."""
        self._put(self.flat, values.flatten()[self.start : self.start + self.numel])

    def _put(self, target: torch.Tensor, values: torch.Tensor) -> None:
        target.detach().view(-1)[self.offset : self.offset + self.numel].copy_(values)


def write_masters(engine: Any, values: Callable[[Shard], torch.Tensor]) -> None:
    """Gives the masters the fp32 `values` of the parts of the model's tensors, and the 16-bit copies their rounding.

    DeepSpeed makes masters from weights that are rounded already. Every rank calls it, before the first step.
    """
    with torch.no_grad(), states_in_reach(engine, writable=True):
        for slot in _slots(engine):
            slot.write_part(values(slot.shard))
        _refresh_copies(engine)


def load_other_layout(engine: Any, folder: Path) -> None:
    """Loads masters, moments, 16-bit copies and buffers; every rank calls it.

    Raises:
        UserError: the checkpoint lacks a tensor of the model, or has it in another shape.
    """
    masters, saved = open_master_weights(folder), open_optimizer_state(folder)
    _check_names(engine, masters, folder)
    with torch.no_grad(), states_in_reach(engine, writable=True):
        _write(engine, masters, saved)
        for shard, buffer in saved_buffers(engine.module):
            buffer.copy_(masters[shard.name].read())
        _refresh_copies(engine)


def _check_names(engine: Any, masters: Any, folder: Path) -> None:
    for shard, _ in [*parameters(engine.module), *saved_buffers(engine.module)]:
        found = tuple(masters[shard.name].shape) if shard.name in masters else None
        if found != tuple(shard.shape):
            raise UserError(
                f"{folder} has {shard.name} in shape {found}, the model has it in {tuple(shard.shape)}",
                "the checkpoint is of another model",
            )


def _write(engine: Any, masters: Any, saved: OptimizerState) -> None:
    optimizer = engine.optimizer
    adam = optimizer.optimizer if engine.zero_optimization_stage() else optimizer
    forget_moments(engine)
    for slot in _slots(engine):
        slot.write(slot.flat, masters[slot.shard.name])
        if not saved.step:
            continue
        state = adam.state[slot.flat]
        if not state:
            state |= _fresh_state(adam, slot.flat, saved, getattr(optimizer, "optimizer_swapper", None))
        for key, moments in saved.moments.items():
            slot.write(state[key], moments[slot.shard.name])


def _fresh_state(adam: Any, flat: torch.Tensor, saved: OptimizerState, swapper: Any = None) -> dict[str, Any]:
    """What Adam makes at its first step; torch's counts steps in a tensor, DeepSpeed's in a number.

    A fused kernel reads the tensor beside the parameter, on its device; else torch keeps it on the CPU.
    """
    counts_in_tensor = isinstance(adam, torch.optim.Optimizer) and type(adam).__module__.startswith("torch.")
    beside = any(group.get("fused") or group.get("capturable") for group in adam.param_groups)
    device = flat.device if beside else torch.device("cpu")
    step = torch.tensor(float(saved.step), device=device) if counts_in_tensor else saved.step
    return {"step": step, **{key: zero_moment(swapper, flat, key) for key in saved.moments}}


def _slots(engine: Any) -> Iterator[Slot]:
    find = {0: _whole, 1: _shared, 2: _shared, 3: _partitioned}[engine.zero_optimization_stage()]
    for shard, parameter in parameters(engine.module):
        slot = find(engine.optimizer, shard, parameter)
        if slot and slot.numel:
            yield slot


def _whole(_optimizer: Any, shard: Shard, parameter: Any) -> Slot:
    """ZeRO 0: the parameter is its own master."""
    return Slot(shard, 0, parameter.numel(), parameter, 0)


def _shared(optimizer: Any, shard: Shard, parameter: Any) -> Slot | None:
    """ZeRO 1 and 2: what of the parameter falls into this rank's share of its group's flat vector."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Slot(shard, here.start, here.numel, flat, there.start)


def _partitioned(optimizer: Any, shard: Shard, parameter: Any) -> Slot:
    """ZeRO 3: this rank's share of the parameter, without the last ranks' padding."""
    group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = optimizer._get_param_partition_rank(parameter) * numel
    own = max(0, min(numel, parameter.ds_numel - start))
    return Slot(shard, start, own, optimizer.fp32_partitioned_groups_flat[group], offset)


def _refresh_copies(engine: Any) -> None:
    """The weights that the model computes with, from the masters."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()


def recount_steps(engine: Any) -> None:
    """Gives DeepSpeed's CPU Adam the bias corrections of a run that was never interrupted.

    It multiplies the powers of the betas up from step to step, in fp32, and saves none of it; after a load it would take
    them from pow(), which rounds otherwise. So it counts to the step once more, over nothing.
    """
    adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
    op = getattr(adam, "ds_opt_adam", None)
    if op is None:
        return
    group, nothing = adam.param_groups[0], torch.empty(0)
    hyper = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    op.destroy_adam(adam.opt_id)
    op.create_adam(adam.opt_id, *hyper, adam.adam_w_mode, False)
    for step in range(1, max((state["step"] for state in adam.state.values()), default=0) + 1):
        op.adam_update(adam.opt_id, step, *hyper, group["bias_correction"], nothing, nothing, nothing, nothing)


def loss_scale_of(engine: Any) -> dict[str, float] | None:
    """fp16: where the search for the loss scale stands; it depends on no layout."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not hasattr(scaler, "last_overflow_iter"):
        return None
    return {name: getattr(scaler, name) for name in _SCALER}


def restore_loss_scale(engine: Any, saved: dict[str, float] | None) -> None:
    """Goes on with the saved search."""
    for name, value in (saved or {}).items():
        setattr(engine.optimizer.loss_scaler, name, value)
