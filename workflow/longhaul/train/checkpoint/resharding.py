"""Loads a checkpoint of another number of ranks, ZeRO stage or parallel layout; sets fp32 master weights.

DeepSpeed's own load needs the ranks that saved. Here every rank reads, tensor by tensor, the elements of the master weights and
of Adam's moments that its optimizer owns, and writes them where the optimizer keeps them. The loaded numbers are the saved
ones; only later sums over ranks are rounded differently.

In the same way a stage in half precision gets the fp32 weights that it starts from as its master weights, without rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longhaul.checkpoint_io import LazyTensor, OptimizerState, open_master_weights, open_optimizer_state
from longhaul.checkpoint_io.tensor_slice import TensorSlice
from longhaul.compat.deepspeed import Engine
from longhaul.compat.deepspeed_optimizer_states import (
    OwnedRange,
    clear_adam_state,
    mapped_optimizer_states,
    owned_range,
    update_weights_from_masters,
    zero_moment,
)
from longhaul.errors import UserError
from longhaul.train.parallel.slice_model import buffer_slices, parameter_slices


@dataclass(frozen=True)
class OwnedElements:
    """The elements of one parameter that this rank's optimizer owns.

    tensor_slice: what this rank holds of the model's tensor
    range:        the owned elements of that slice, and where the optimizer keeps them
    """

    tensor_slice: TensorSlice
    range: OwnedRange

    def write_from(self, source: LazyTensor, target: torch.Tensor) -> None:
        """Read the elements from a stored tensor into the optimizer's `flat` tensor, or into a moment of its shape."""
        start, stop = self.range.start, self.range.start + self.range.numel
        self._write(target, self.tensor_slice.read_range(source, start, stop))

    def write_master(self, values: torch.Tensor) -> None:
        """Write the elements to the master weights; values: the whole slice."""
        self._write(self.range.flat, values.flatten()[self.range.start : self.range.start + self.range.numel])

    def _write(self, target: torch.Tensor, values: torch.Tensor) -> None:
        target.detach().view(-1)[self.range.offset : self.range.offset + self.range.numel].copy_(values)


def write_master_weights(engine: Engine, values: Callable[[TensorSlice], torch.Tensor]) -> None:
    """Set the master weights to the fp32 `values` of the model's tensors, and the 16-bit weights to their rounding.

    DeepSpeed makes master weights from weights that are rounded already. Every rank calls this, before the first step.
    """
    with torch.no_grad(), mapped_optimizer_states(engine, writable=True):
        for owned in _owned_elements(engine):
            owned.write_master(values(owned.tensor_slice))
        update_weights_from_masters(engine)


def load_resharded(engine: Engine, folder: Path) -> None:
    """Load master weights, moments, 16-bit weights and buffers; every rank calls this.

    Raises:
        UserError: the checkpoint lacks a tensor of the model, or has it in another shape.
    """
    masters, saved = open_master_weights(folder), open_optimizer_state(folder)
    _check_shapes(engine, masters, folder)
    with torch.no_grad(), mapped_optimizer_states(engine, writable=True):
        _load_optimizer(engine, masters, saved)
        for tensor_slice, buffer in buffer_slices(engine.module):
            buffer.copy_(masters[tensor_slice.name].read())
        update_weights_from_masters(engine)


def _check_shapes(engine: Engine, masters: Mapping[str, LazyTensor], folder: Path) -> None:
    for tensor_slice, _ in [*parameter_slices(engine.module), *buffer_slices(engine.module)]:
        found = tuple(masters[tensor_slice.name].shape) if tensor_slice.name in masters else None
        if found != tuple(tensor_slice.shape):
            state = f"has {tensor_slice.name} in shape {found}" if found else f"does not have {tensor_slice.name}"
            raise UserError(
                f"{folder} {state}; the model has it in shape {tuple(tensor_slice.shape)}",
                "the checkpoint belongs to another model: move it away",
            )


def _load_optimizer(engine: Engine, masters: Mapping[str, LazyTensor], saved: OptimizerState) -> None:
    optimizer = engine.optimizer
    adam = optimizer.optimizer if engine.zero_optimization_stage() else optimizer
    swapper = getattr(optimizer, "optimizer_swapper", None)
    clear_adam_state(engine)
    for owned in _owned_elements(engine):
        flat, name = owned.range.flat, owned.tensor_slice.name
        owned.write_from(masters[name], flat)
        if not saved.step:
            continue
        state = adam.state[flat]
        if not state:
            state |= new_adam_state(adam, flat, saved, swapper)
        for key, moments in saved.moments.items():
            owned.write_from(moments[name], state[key])


def new_adam_state(adam: Any, flat: torch.Tensor, saved: OptimizerState, swapper: Any = None) -> dict[str, Any]:
    """Return the state that Adam makes at its first step, at the saved step and with zero moments.

    torch's Adam counts steps in a tensor, DeepSpeed's in a number. A fused kernel reads that tensor on the parameter's device;
    otherwise torch keeps it on the CPU.
    """
    counts_in_tensor = isinstance(adam, torch.optim.Optimizer) and type(adam).__module__.startswith("torch.")
    is_on_device = any(group.get("fused") or group.get("capturable") for group in adam.param_groups)
    device = flat.device if is_on_device else torch.device("cpu")
    step = torch.tensor(float(saved.step), device=device) if counts_in_tensor else saved.step
    return {"step": step, **{key: zero_moment(swapper, flat, key) for key in saved.moments}}


def _owned_elements(engine: Engine) -> Iterator[OwnedElements]:
    for tensor_slice, parameter in parameter_slices(engine.module):
        owned = owned_range(engine, parameter)
        if owned and owned.numel:
            yield OwnedElements(tensor_slice, owned)
