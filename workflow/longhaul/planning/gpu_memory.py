"""Sums the memory estimate of the fullest rank: model_state_memory.py gives the states, activation_memory.py the activations.
Nothing is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from longhaul.config.model_size import ModelSize
from longhaul.config.stage_config import Stage
from longhaul.planning.activation_memory import activation_bytes, attention_mask_bytes, logits_bytes
from longhaul.planning.layers_per_pipeline_rank import layers_per_pipeline_rank
from longhaul.planning.model_state_memory import (
    gathered_weight_bytes,
    gradient_bucket_bytes,
    model_states,
    optimizer_step_bytes,
    snapshot_bytes,
    swap_buffer_bytes,
)

GIB = 2**30


def needed_gib(needed: float) -> str:
    """Return GiB of memory that is needed, rounded up: a message shows more than the limit that is exceeded."""
    return f"{math.ceil(10 * needed / GIB) / 10:.1f}"


def available_gib(available: float) -> str:
    """Return GiB of memory that there is, rounded down."""
    return f"{math.floor(10 * available / GIB) / 10:.1f}"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank.

    On the GPU:
        weights, gradients, optimizer: model states, which exist all the time
        activations:      saved for the backward pass, with the attention mask
        logits:           logits of one chunk of tokens, with the gradients of the output head
        gathered_weights: whole weights that ZeRO-3 has gathered
        gradient_buckets: buffers for gradient reduction
        optimizer_step:   additional memory of the optimizer step
    On the node:
        host:   CPU memory for offload, including `locked`
        locked: CPU memory that must be locked
        disk:   files below storage.scratch
        snapshot: CPU memory for the copy of a save, in addition to `host`
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gathered_weights: int
    gradient_buckets: int
    optimizer_step: int
    host: int
    locked: int
    disk: int
    snapshot: int

    @property
    def model_states(self) -> int:
        """Bytes on the GPU that exist before the first token: weights, gradients and optimizer states."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Peak bytes on the GPU.

        The optimizer step runs after activations, logits and buckets are freed, so only the larger of both parts counts.
        """
        passes = self.activations + self.logits + self.gathered_weights + self.gradient_buckets
        return self.model_states + max(passes, self.optimizer_step)

    def as_gib(self) -> dict[str, float]:
        """Return all fields and the total in GiB."""
        return {key: round(value / GIB, 3) for key, value in {**asdict(self), "total": self.total}.items()}


def estimate_gpu_memory(stage: Stage, sizes: ModelSize, world_size: int, on_gpus: bool = True) -> MemoryEstimate:
    """Return the memory of the rank that needs the most.

    This is not always the rank with the most parameters, because ZeRO partitions experts over fewer ranks than other weights.
    The model states follow Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, section 3).

    on_gpus: False for ranks that compute on CPUs, where the same tensors are in the memory of the node
    """
    estimates = [
        _pipeline_rank_memory(stage, sizes, world_size, on_gpus, *parameters)
        for parameters in set(_parameters_per_pipeline_rank(stage, sizes))
    ]
    return max(estimates, key=lambda memory: (memory.total, memory.host))


def _pipeline_rank_memory(
    stage: Stage, sizes: ModelSize, world_size: int, on_gpus: bool, other_parameters: int, expert_parameters: int
) -> MemoryEstimate:
    """Return the memory of a rank with this many parameters of routed experts and of everything else."""
    parallel = stage.parallel
    data_parallel = world_size // (parallel.tensor * parallel.pipeline)
    expert_data_parallel = data_parallel // parallel.expert  # ranks with the same routed experts
    parameters = other_parameters + expert_parameters
    states = model_states(stage, other_parameters, data_parallel) + model_states(
        stage, expert_parameters, expert_data_parallel
    )
    activations, offloaded_activations = activation_bytes(stage, sizes, on_gpus)
    partition = other_parameters // data_parallel + expert_parameters // expert_data_parallel
    locked = swap_buffer_bytes(stage, sizes, partition, data_parallel)
    return MemoryEstimate(
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=activations + attention_mask_bytes(stage, sizes, on_gpus),
        logits=logits_bytes(stage, sizes),
        gathered_weights=gathered_weight_bytes(stage, sizes, data_parallel, parameters),
        gradient_buckets=gradient_bucket_bytes(stage, parameters, data_parallel),
        optimizer_step=optimizer_step_bytes(stage, other_parameters, data_parallel, on_gpus)
        + optimizer_step_bytes(stage, expert_parameters, expert_data_parallel, on_gpus),
        host=states.host + offloaded_activations + locked,
        locked=locked,
        disk=states.disk,
        snapshot=snapshot_bytes(stage, parameters, partition),
    )


def _parameters_per_pipeline_rank(stage: Stage, sizes: ModelSize) -> Iterator[tuple[int, int]]:
    """Yield (parameters without routed experts, parameters of routed experts) of one rank at each pipeline position."""
    parallel = stage.parallel
    for outside_layers, dense, sparse in _layers_per_pipeline_rank(stage, sizes):
        unsplit = (dense + sparse) * sizes.unsplit_per_layer
        split = outside_layers + dense * sizes.dense_layer + sparse * sizes.sparse_layer - unsplit
        experts = sparse * sizes.routed_experts_per_layer // (parallel.tensor * parallel.expert)
        yield unsplit + split // parallel.tensor, experts


def _layers_per_pipeline_rank(stage: Stage, sizes: ModelSize) -> Iterator[tuple[int, int, int]]:
    """Yield (parameters outside the layers, dense layers, sparse layers) of each pipeline rank."""
    pipeline = stage.parallel.pipeline
    # The last pipeline rank holds a second copy of a tied embedding as its head.
    last = max(sizes.outside_layers - sizes.embedding, sizes.embedding)
    outside = [sizes.outside_layers] if pipeline == 1 else [sizes.embedding, *[0] * (pipeline - 2), last]
    for outside_layers, layers in zip(outside, layers_per_pipeline_rank(sizes.layers, pipeline), strict=True):
        sparse = sum(sizes.is_sparse[layer] for layer in layers)
        yield outside_layers, len(layers) - sparse, sparse
