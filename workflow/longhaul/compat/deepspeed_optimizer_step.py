"""Patches the step of ZeRO 1 to 3: one call updates a partition, in one pass over memory. Written for DeepSpeed 0.19.8."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Update = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(parameter group, master weights, gradient, weights): the last three are flat tensors of this rank's partition."""


def can_update_in_one_pass(engine: Any) -> bool:
    """Return whether `update_in_one_pass` works with this engine: ZeRO in bf16, with weights and states on the device."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        is_on_device = not (optimizer.offload_optimizer or optimizer.offload_param or optimizer.use_muon)
    else:
        is_on_device = engine.zero_optimization_stage() in (1, 2) and not optimizer.cpu_offload
    return is_on_device and optimizer.dtype == torch.bfloat16


def update_in_one_pass(engine: Any, update: Update) -> None:
    """Let ZeRO call `update` for each part of this rank's partition.

    DeepSpeed's step converts the gradient to fp32 before the inner optimizer runs, and the master weights to bf16 after it. Each
    is a pass over memory, and neither can be switched off. ZeRO 3 also measures the norm in fp64, scales the gradients in a pass
    of their own, and lets the CPU wait for the norm.
    """
    step = _zero_3_step if engine.zero_optimization_stage() == 3 else _zero_1_or_2_step
    engine.optimizer.step = partial(step, engine.optimizer, update)


def _zero_1_or_2_step(optimizer: Any, update: Update, _closure: Any = None) -> None:
    from deepspeed.runtime.utils import all_gather_dp_groups

    optimizer.micro_step_id, optimizer.overflow = -1, False
    optimizer._global_grad_norm = optimizer.scaled_global_norm()
    for group in range(len(optimizer.bit16_groups)):
        _update_group(optimizer, group, update)
    all_gather_dp_groups(
        groups_flat=optimizer.bit16_groups_flat,
        partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
        dp_process_group=optimizer.real_dp_process_group,
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )
    for group in range(len(optimizer.bit16_groups)):
        optimizer._update_model_bit16_weights(group)


def _update_group(optimizer: Any, group: int, update: Update) -> None:
    """Flatten the gradients of this rank's partition of a group, update it, and free the gradients."""
    process_group = optimizer.real_dp_process_group[group]
    rank, ranks = torch.distributed.get_rank(process_group), torch.distributed.get_world_size(process_group)
    optimizer.free_grad_in_param_list(optimizer.params_not_in_partition[group])
    gradients = optimizer.averaged_gradients[group]
    flat = optimizer._get_preflattened_grad_partition(group)
    if flat is None and rank == ranks - 1:  # the last partition may end with padding
        flat = optimizer.flatten_dense_tensors_aligned(gradients, int(optimizer.partition_size[group]))
    elif flat is None:
        flat = optimizer.flatten(gradients)
    weights = optimizer.parallel_partitioned_bit16_groups[group][rank].data
    update(group, optimizer.single_partition_of_fp32_groups[group], flat, weights)
    optimizer.free_grad_in_param_list(optimizer.params_in_partition[group])
    optimizer._release_preflattened_grad_buffers(group)
    optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None


def _zero_3_step(optimizer: Any, update: Update, _closure: Any = None) -> None:
    optimizer._pre_step()
    optimizer._partition_all_parameters()
    optimizer.overflow = False
    gradients = [_flat_gradient(optimizer, parts) for _, parts in sorted(optimizer.averaged_gradients.items())]
    optimizer._global_grad_norm = _zero_3_norm(optimizer, gradients)
    optimizer.zero_grad(set_to_none=True)
    for sub_group, gradient in enumerate(gradients):
        weights = optimizer.fp16_partitioned_groups_flat[sub_group].data
        master = optimizer.fp32_partitioned_groups_flat[sub_group]
        update(optimizer.sub_group_to_group_id[sub_group], master, gradient, weights)
        optimizer._unflatten_partitioned_parameters(sub_group)
        optimizer.averaged_gradients[sub_group] = None
    optimizer._post_step(set())


def _flat_gradient(optimizer: Any, parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the gradient of a sub-group of ZeRO 3, whose parts follow each other in DeepSpeed's buffer.

    The parts of frozen parameters are elsewhere. Then they are copied together.
    """
    buffer, first = optimizer.grad_partitions_flat_buffer, parts[0].storage_offset()
    place = first
    for part in parts:
        if part.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr() or part.storage_offset() != place:
            return optimizer.flatten(parts)
        place += part.numel()
    return buffer.narrow(0, first, place - first)


def _zero_3_norm(optimizer: Any, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return the global gradient norm. That of parameters that ranks slice is left to DeepSpeed: other ranks share them."""
    from deepspeed.runtime.utils import combine_grad_norm_groups

    parameters = [parameter for group in optimizer.fp16_groups for parameter in group]
    if optimizer.model_parallel_group is not None or not all(getattr(p, "allreduce", True) for p in parameters):
        return combine_grad_norm_groups(optimizer._get_norm_groups())
    squares = [torch.linalg.vector_norm(gradient, dtype=torch.float32).square() for gradient in gradients]
    square = torch.stack(squares).sum()
    torch.distributed.all_reduce(square, group=optimizer._get_param_partition_group(parameters[0]))
    return square.sqrt()
