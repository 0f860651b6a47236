"""Bytes of weights, gradients, optimizer states and buffers on one rank, by ZeRO stage and offload; snapshot of a save."""

from __future__ import annotations

from dataclasses import dataclass

from longhaul.config.model_size import ModelSize
from longhaul.config.stage_config import Stage
from longhaul.planning.constants_shared_with_trainer import (
    COMPUTE_BYTES,
    POWERSGD_BUCKET_ELEMENTS,
    SWAP_OPTIMIZER_BUFFERS,
    SWAP_PARAM_BUFFERS,
    SWAP_SUB_GROUP_ELEMENTS,
    swap_param_buffer_elements,
)

# DeepSpeed's defaults, in elements: reduce_bucket_size, stage3_max_live_parameters and sub_group_size.
_DEFAULT_REDUCE_BUCKET = 500_000_000
_DEFAULT_MAX_LIVE_PARAMETERS = 1_000_000_000
_DEFAULT_SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class ModelStates:
    """Bytes of the model states of one rank: on the GPU (weights, gradients, optimizer), in CPU memory (host) and on disk."""

    weights: int
    gradients: int
    optimizer: int
    host: int
    disk: int

    def __add__(self, other: ModelStates) -> ModelStates:
        return ModelStates(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.host + other.host,
            self.disk + other.disk,
        )


def model_states(stage: Stage, parameters: int, ranks: int) -> ModelStates:
    """Return the model states for `parameters` parameters that ZeRO partitions over `ranks` ranks.

    With ZeRO stage 1 or higher, the optimizer has fp32 master weights and two moments: 12 bytes per parameter.
    """
    zero, width = stage.zero, COMPUTE_BYTES[stage.precision]
    weights = width * parameters // (ranks if zero.stage == 3 else 1)
    if zero.zero_hpz_partition_size > 1:
        # The second copy of hpZ exists all the time (ds_secondary_tensor).
        weights += width * parameters // zero.zero_hpz_partition_size
    gradients = width * parameters // (ranks if zero.stage >= 2 else 1)
    optimizer = 12 * parameters // ranks if zero.stage >= 1 else 8 * parameters
    host = disk = 0
    if zero.offload_optimizer == "cpu":
        # DeepSpeed copies the gradients to the host in fp32, one bucket after the other.
        host, optimizer, gradients = optimizer + 4 * parameters // ranks, 0, 0
    if zero.offload_optimizer == "nvme":
        # The partition's gradients stay on the host until all are complete. They are written to disk in fp32.
        host, disk, optimizer, gradients = gradients, optimizer + 4 * parameters // ranks, 0, 0
    if zero.offload_param == "cpu":
        host, weights = host + weights, 0
    if zero.offload_param == "nvme":
        disk, weights = disk + weights, 0
    return ModelStates(weights, gradients, optimizer, host, disk)


def swap_buffer_bytes(stage: Stage, sizes: ModelSize, partition: int, ranks: int) -> int:
    """Return the bytes of locked buffers for states on disk; `partition` is the number of this rank's elements.

    A sub-group is complete with the parameter that exceeds its size, so it can be larger by one parameter's partition.
    """
    offload = stage.zero
    size = SWAP_SUB_GROUP_ELEMENTS if offload.offload_optimizer == "nvme" else _DEFAULT_SUB_GROUP
    sub_group = min(partition, size + max(sizes.embedding, sizes.largest_layer) // ranks)
    total = 0
    if offload.offload_optimizer == "nvme":
        total += 4 * SWAP_OPTIMIZER_BUFFERS * sub_group
    if offload.offload_param == "nvme":
        # Buffers for the passes, and the weights of one sub-group after its update.
        elements = SWAP_PARAM_BUFFERS * swap_param_buffer_elements(sizes, ranks) + sub_group
        total += COMPUTE_BYTES[stage.precision] * elements
    return total


def snapshot_bytes(stage: Stage, parameters: int, partition: int) -> int:
    """Return the bytes that a rank copies for a save: its optimizer states, and the weights of its part of the model.

    Only the first data-parallel rank saves weights, and none does under ZeRO 3. States on a disk are not copied.
    partition: number of parameters whose optimizer states this rank has
    """
    if stage.zero.offload_optimizer == "nvme":
        return 0
    optimizer = 12 * partition if stage.zero.stage >= 1 else 8 * parameters
    if stage.communication.powersgd:
        optimizer += 4 * parameters  # the compression error
    return optimizer + (COMPUTE_BYTES[stage.precision] * parameters if stage.zero.stage < 3 else 0)


def optimizer_step_bytes(stage: Stage, parameters: int, ranks: int, on_gpus: bool = True) -> int:
    """Return the additional bytes of the optimizer step: a flat copy of the partition's gradients, and its fp32 copy.

    An update in one pass reads the gradients in their own precision. Under ZeRO 3 they are flat already.
    """
    if stage.zero.stage == 0 or stage.zero.offload_optimizer != "none":
        return 0
    width = COMPUTE_BYTES[stage.precision]
    if on_gpus and _updates_in_one_pass(stage):
        return 0 if stage.zero.stage == 3 else width * parameters // ranks
    return (width + (0 if width == 4 else 4)) * parameters // ranks


def _updates_in_one_pass(stage: Stage) -> bool:
    """Return whether the trainer updates a partition in one pass on GPUs (train/detect_bad_steps.py)."""
    is_bf16 = stage.precision in ("bf16", "fp8")
    waits_for_result = stage.bad_steps.spike_factor or stage.communication.powersgd
    is_whole_model = stage.parallel.pipeline == 1
    is_on_gpu = stage.zero.offload_optimizer == stage.zero.offload_param == "none"
    return is_bf16 and is_on_gpu and is_whole_model and stage.compile == "auto" and not waits_for_result


def gathered_weight_bytes(stage: Stage, sizes: ModelSize, ranks: int, parameters: int) -> int:
    """Return the bytes of weights that ZeRO-3 has gathered; `parameters` is the number in this rank's part of the model.

    ZeRO-3 always gathers the layer in use. Tensor and expert parallelism make this layer smaller. It also keeps and prefetches
    up to stage3_max_live_parameters elements. Weights on disk are neither kept nor prefetched (planning/deepspeed_config.py).
    With a single rank, the partition is the whole tensor, and it is only copied if it is not on the GPU.
    """
    zero, parallel = stage.zero, stage.parallel
    if zero.stage < 3 or (ranks == 1 and zero.offload_param == "none"):
        return 0
    experts = sizes.routed_experts_per_layer // parallel.expert
    split = sizes.largest_layer - sizes.routed_experts_per_layer + experts - sizes.unsplit_per_layer
    layer = sizes.unsplit_per_layer + split // parallel.tensor
    max_live = zero.stage3_max_live_parameters or _DEFAULT_MAX_LIVE_PARAMETERS
    kept = 0 if zero.offload_param == "nvme" else min(parameters, max_live)
    return COMPUTE_BYTES[stage.precision] * max(layer, kept)


def reduces_gradients(stage: Stage, ranks: int) -> bool:
    """Return whether ZeRO puts gradients into buckets. A single data-parallel rank reduces nothing before ZeRO 3.

    ranks: data-parallel ranks, and the sequence-parallel ranks of each
    """
    return stage.zero.stage > 0 and (ranks > 1 or stage.zero.stage == 3)


def gradient_bucket_bytes(stage: Stage, parameters: int, ranks: int) -> int:
    """Return the bytes of the buffers for gradient reduction over this number of data-parallel ranks."""
    if stage.communication.powersgd:
        # All in fp32: the compression error of all gradients before and after the step; one bucket's gradients and their copy.
        return 4 * (2 * parameters + 2 * min(POWERSGD_BUCKET_ELEMENTS, parameters))
    zero, reduces = stage.zero, reduces_gradients(stage, ranks)
    # DeepSpeed copies gradients to the host by way of a bucket, whatever contiguous_gradients says.
    copies_by_bucket = 1 <= zero.stage <= 2 and zero.offload_optimizer != "none"
    if not copies_by_bucket and not (reduces and zero.contiguous_gradients):
        return 0
    # With overlap there are two: one is filled while the other is reduced. ZeRO-3 takes gradients out at once and has one.
    count = 2 if reduces and zero.stage < 3 and zero.overlap_comm else 1
    return count * COMPUTE_BYTES[stage.precision] * (zero.reduce_bucket_size or _DEFAULT_REDUCE_BUCKET)
