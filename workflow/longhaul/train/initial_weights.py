"""Sets the initial weights and the spread of random ones: from the seed (counter_based_normal.py), an earlier
stage's checkpoint, or pretrained_weights.py.

Values are looked up by the tensor's name, one tensor at a time. So every parallel layout starts from the same bits, and under
ZeRO 3 no rank holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longhaul.checkpoint_io import open_master_weights
from longhaul.checkpoint_io.tensor_slice import TensorSlice
from longhaul.compat.deepspeed import Engine
from longhaul.errors import InputError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint.resharding import write_master_weights
from longhaul.train.checkpoint.weights_identity import StartingCheckpoint
from longhaul.train.counter_based_normal import normal
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.parallel.slice_model import buffer_slices, parameter_slices
from longhaul.train.pretrained_weights import pretrained_values

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Shapes = dict[str, tuple[int, ...]]
Values = Callable[[TensorSlice], torch.Tensor]


def initial_values(
    job: TrainSpec, config: PreTrainedConfig, shapes: Shapes, start: StartingCheckpoint | None, device: torch.device
) -> Values:
    """Return a function that gives the initial fp32 values of a slice of a tensor.

    config: the model's Hugging Face config
    shapes: those of the whole model, of all ranks
    device: where random values are made; they have the same bits on every device

    Raises:
        UserError: the weights do not fit the architecture.
    """
    if start:
        return _checkpoint_values(shapes, start)
    if job.pretrained:
        return pretrained_values(Path(job.pretrained), shapes, config)
    values = seeded_values(config, job.seed, device)
    return lambda tensor_slice: tensor_slice.extract(values(tensor_slice.name, torch.Size(tensor_slice.shape)))


def seeded_values(
    config: PreTrainedConfig, seed: int, device: torch.device
) -> Callable[[str, torch.Size], torch.Tensor]:
    """Return a function (name, shape) -> values: ones for norms, zeros for biases, else normal with `initializer_range`.

    A value depends only on the seed, the parameter's name and the position in the parameter.
    """

    def values(name: str, shape: torch.Size) -> torch.Tensor:
        if name.endswith(("bias", "e_score_correction_bias")):
            return torch.zeros(shape, device=device)
        if len(shape) < 2:
            return torch.ones(shape, device=device)
        return normal(f"{seed}/{name}", shape, config.initializer_range, device)

    return values


def _checkpoint_values(shapes: Shapes, start: StartingCheckpoint) -> Values:
    """Return the master weights of an earlier stage, for any layout of that stage."""
    weights = open_master_weights(start.folder)
    if differing := sorted(set(weights) ^ set(shapes)):
        raise InputError(
            f"{start.folder} and the model differ in {', '.join(differing[:5])} ({len(differing)} in all)",
            "start from a stage that trained the same model",
        )
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise InputError(
                f"{start.folder}: {name} has shape {list(weights[name].shape)}, the model expects {list(shape)}",
                "start from a stage that trained the same model",
            )
    return lambda tensor_slice: tensor_slice.read(weights[tensor_slice.name])


def own_shapes(model: torch.nn.Module) -> Shapes:
    """Return name -> shape of the whole tensors of which this rank holds a slice."""
    slices = [*parameter_slices(model), *buffer_slices(model)]
    return {tensor_slice.name: tuple(tensor_slice.shape) for tensor_slice, _ in slices}


def all_shapes(model: torch.nn.Module, context: DistributedContext) -> Shapes:
    """Return name -> shape of all tensors of the model, gathered from all ranks."""
    return {name: shape for part in context.gather(own_shapes(model)) for name, shape in part.items()}


def fill_weights(model: torch.nn.Module, values: Values, with_buffers: bool) -> None:
    """Write the initial values into this rank's parameters, and into the saved buffers where they have values to start from."""
    with torch.no_grad():
        for tensor_slice, parameter in parameter_slices(model):
            with _gathered(parameter):
                if _is_filled_here(parameter):
                    parameter.copy_(values(tensor_slice).to(parameter.dtype))
        for tensor_slice, buffer in buffer_slices(model) if with_buffers else ():
            buffer.copy_(values(tensor_slice))


def set_initial_master_weights(
    engine: Engine,
    job: TrainSpec,
    config: PreTrainedConfig,
    start: StartingCheckpoint | None,
    context: DistributedContext,
) -> None:
    """Set the master weights of a stage in half precision to the fp32 weights of its source, before the first step.

    DeepSpeed makes master weights from the model's weights, which are rounded to half precision already.
    """
    if job.stage.precision == "fp32" or not (start or job.pretrained):
        return
    shapes = all_shapes(engine.module, context)
    write_master_weights(engine, initial_values(job, config, shapes, start, context.device))


def _is_filled_here(parameter: Any) -> bool:
    """Return whether this rank fills the parameter: under ZeRO 3 only the first rank that shares it."""
    return not hasattr(parameter, "ds_id") or torch.distributed.get_rank(parameter.ds_process_group) == 0


def _gathered(parameter: torch.nn.Parameter) -> AbstractContextManager[object]:
    """Gather a parameter of ZeRO 3; the first rank's values are kept, so no other rank reads any."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
