"""Patches the step of ZeRO 1 and 2: one call updates a partition, in one pass over memory. Written for DeepSpeed 0.19.8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def can_update_in_one_pass(engine: Any) -> bool:
    """Return whether `update_in_one_pass` works with this engine: ZeRO 1 or 2 in bf16, with states on the device."""
    optimizer = engine.optimizer
    return (
        engine.zero_optimization_stage() in (1, 2) and optimizer.dtype == torch.bfloat16 and not optimizer.cpu_offload
    )


def update_in_one_pass(engine: Any, update: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]) -> None:
    """Let ZeRO 1 and 2 call `update(group, master weights, gradient, weights)` for each parameter group's own partition.

    All three tensors are flat. DeepSpeed's step converts the gradient to fp32 before the inner optimizer runs, and the master
    weights to bf16 after it. Each is a pass over memory, and neither can be switched off.
    """
    from deepspeed.runtime.utils import all_gather_dp_groups

    optimizer = engine.optimizer

    def step(_closure: Any = None) -> None:
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

    optimizer.step = step


def _update_group(optimizer: Any, group: int, update: Callable[..., None]) -> None:
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
