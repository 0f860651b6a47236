"""Memory of one GPU while it trains a stage, estimated from sizes alone; nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from longhaul.config.model_size import ModelSize, stage_layers
from longhaul.config.run_config import Stage

GIB = 2**30
COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# DeepSpeed's default bucket, in elements.
_DEFAULT_BUCKET = 500_000_000
# Tokens whose logits a rank has at a time (train/loss.py): enough rows to keep the matmuls as fast as whole ones.
LOSS_CHUNK_TOKENS = 2048
# Elements that PowerSGD takes at a time (train/powersgd.py). What it keeps lies in such buckets, so no config changes them.
POWERSGD_BUCKET = 25_000_000
# DeepSpeed's default of stage3_max_live_parameters.
_MAX_LIVE_PARAMETERS = 1_000_000_000
# Elements of the sub-groups that are updated one after the other where the optimizer lies on a disk; DeepSpeed's default, ten
# times as many, would lock 16 GB of memory for each rank.
SWAP_GROUP = 100_000_000
_DEFAULT_GROUP = 1_000_000_000
# Masters, two moments and gradients of the sub-group at work.
SWAP_BUFFERS = 4
# A rank's part of a tensor that goes to the disk; less stays in CPU memory. DeepSpeed's MIN_AIO_BYTES.
SWAPPED_BYTES = 1 << 20
# Weights on a disk: partitions that may be there at once. The module at work has two at most, one for each of its weights.
SWAP_PARAM_BUFFERS = 8


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU; `gathered` are ZeRO-3's whole weights in use; `host` is the CPU memory offload needs per rank, of which
    `locked` must be locked, and `disk` what it needs of the node's disk.

    `update` is what the optimizer's step adds, when activations, logits and buckets are gone: the larger of both counts.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gathered: int
    buckets: int
    update: int
    host: int
    locked: int
    disk: int

    @property
    def states(self) -> int:
        """What must be there before the first token: weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        passes = self.activations + self.logits + self.gathered + self.buckets
        return self.states + max(passes, self.update)

    def as_gib(self) -> dict[str, float]:
        """Every part and the total, in GiB."""
        return {key: round(value / GIB, 3) for key, value in {**asdict(self), "total": self.total}.items()}


def estimate(stage: Stage, sizes: ModelSize, world_size: int) -> Memory:
    """Memory of the fullest rank. Model states as in ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3).

    That is not always the one with the most parameters: ZeRO partitions experts over fewer ranks than the rest.
    """
    found = [_of_pipeline_stage(stage, sizes, world_size, *held) for held in set(_held_parameters(stage, sizes))]
    return max(found, key=lambda memory: (memory.total, memory.host))


def _of_pipeline_stage(stage: Stage, sizes: ModelSize, world_size: int, dense: int, experts: int) -> Memory:
    """Of a rank that holds so many parameters: all but routed experts, and routed experts."""
    parallel = stage.parallel
    data_parallel = world_size // (parallel.tensor * parallel.pipeline)
    states = [
        _model_states(stage, dense, data_parallel),
        _model_states(stage, experts, data_parallel // parallel.expert),
    ]
    weights, gradients, optimizer, host, disk = (sum(part) for part in zip(*states, strict=True))
    activations, offloaded = _activations(stage, sizes)
    partition = dense // data_parallel + experts // (data_parallel // parallel.expert)
    locked = _swap_buffers(stage, sizes, partition, data_parallel)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations + _mask(stage),
        logits=_logits(stage, sizes),
        gathered=_gathered(stage, sizes, data_parallel, dense + experts),
        buckets=_buckets(stage, dense + experts),
        update=_update(stage, dense, data_parallel) + _update(stage, experts, data_parallel // parallel.expert),
        host=host + offloaded + locked,
        locked=locked,
        disk=disk,
    )


def _held_parameters(stage: Stage, sizes: ModelSize) -> Iterator[tuple[int, int]]:
    """(all but routed experts, routed experts) that a rank of each stage of the pipeline holds."""
    parallel = stage.parallel
    for ends, dense, mixtures in _stages(stage, sizes):
        whole = (dense + mixtures) * sizes.layer_whole
        split = ends + dense * sizes.layer_dense + mixtures * sizes.layer_sparse - whole
        experts = mixtures * sizes.layer_experts // (parallel.tensor * parallel.expert)
        yield whole + split // parallel.tensor, experts


def _stages(stage: Stage, sizes: ModelSize) -> Iterator[tuple[int, int, int]]:
    """(parameters outside the layers, dense layers, mixtures) of each stage of a pipeline."""
    stages = stage.parallel.pipeline
    # A tied head is the embedding once more.
    last = max(sizes.ends - sizes.embedding, sizes.embedding)
    ends = [sizes.ends] if stages == 1 else [sizes.embedding, *[0] * (stages - 2), last]
    for outside, layers in zip(ends, stage_layers(sizes.layers, stages), strict=True):
        mixtures = sum(sizes.sparse[layer] for layer in layers)
        yield outside, len(layers) - mixtures, mixtures


def _model_states(stage: Stage, parameters: int, ranks: int) -> tuple[int, int, int, int, int]:
    """(weights, gradients, optimizer, host, disk) in bytes; ZeRO >= 1 keeps fp32 masters beside the two moments."""
    zero, width = stage.zero, COMPUTE_BYTES[stage.precision]
    weights = width * parameters // (ranks if zero.stage == 3 else 1)
    if zero.zero_hpz_partition_size > 1:
        # A second copy, which stays (ds_secondary_tensor).
        weights += width * parameters // zero.zero_hpz_partition_size
    gradients = width * parameters // (ranks if zero.stage >= 2 else 1)
    optimizer = 12 * parameters // ranks if zero.stage >= 1 else 8 * parameters
    host = disk = 0
    if zero.offload_optimizer == "cpu":
        # The gradients of offloaded states go to the host in fp32, bucket by bucket.
        host, optimizer, gradients = optimizer + 4 * parameters // ranks, 0, 0
    if zero.offload_optimizer == "nvme":
        # The partition's gradients stay on the host until they are whole, and go to the disk in fp32.
        host, disk, optimizer, gradients = gradients, optimizer + 4 * parameters // ranks, 0, 0
    if zero.offload_param == "cpu":
        host, weights = host + weights, 0
    if zero.offload_param == "nvme":
        disk, weights = disk + weights, 0
    return weights, gradients, optimizer, host, disk


def _swap_buffers(stage: Stage, sizes: ModelSize, partition: int, ranks: int) -> int:
    """Of a partition's largest sub-group, which ends with the parameter that fills it, and of weights that come and go."""
    size = SWAP_GROUP if stage.zero.offload_optimizer == "nvme" else _DEFAULT_GROUP
    group, found = min(partition, size + max(sizes.embedding, sizes.layer_max) // ranks), 0
    if stage.zero.offload_optimizer == "nvme":
        found += 4 * SWAP_BUFFERS * group
    if stage.zero.offload_param == "nvme":
        # Those that passes read, and a sub-group's after its update.
        held = SWAP_PARAM_BUFFERS * swap_param_elements(sizes, ranks) + group
        found += COMPUTE_BYTES[stage.precision] * held
    return found


def swap_param_elements(sizes: ModelSize, ranks: int) -> int:
    """What a buffer must hold of weights on a disk: a rank's part of the largest tensor."""
    return -(-sizes.tensor_max // ranks)


def _update(stage: Stage, parameters: int, ranks: int) -> int:
    """The partition's gradients once more, in one piece, and their fp32 copy."""
    if stage.zero.stage == 0 or stage.zero.offload_optimizer != "none":
        return 0
    width = COMPUTE_BYTES[stage.precision]
    return (width + (0 if width == 4 else 4)) * parameters // ranks


def _gathered(stage: Stage, sizes: ModelSize, ranks: int, held: int) -> int:
    """ZeRO-3 has at least the layer at work in one piece, and prefetches up to DeepSpeed's stage3_max_live_parameters.

    Weights on a disk are neither prefetched nor kept: deepspeed_config.py says why.

    `held` are the parameters of this rank's part of the model, of which tensor and expert parallelism make layers smaller.

    A single rank's partition is the whole, which is only copied where it lies in CPU memory.
    """
    if stage.zero.stage < 3 or (ranks == 1 and stage.zero.offload_param == "none"):
        return 0
    experts = sizes.layer_experts // stage.parallel.expert
    split = sizes.layer_max - sizes.layer_experts + experts - sizes.layer_whole
    layer = sizes.layer_whole + split // stage.parallel.tensor
    live = stage.zero.stage3_max_live_parameters or _MAX_LIVE_PARAMETERS
    kept = 0 if stage.zero.offload_param == "nvme" else min(held, live)
    return COMPUTE_BYTES[stage.precision] * max(layer, kept)


def _activations(stage: Stage, sizes: ModelSize) -> tuple[int, int]:
    """(on the GPU, on the host) in bytes: what layers keep for the backward pass, beside all of the one that is at work."""
    parallel, width = stage.parallel, COMPUTE_BYTES[stage.precision]
    tokens = stage.micro_batch_size * stage.sequence_length // parallel.sequence
    # The first stage of a 1F1B pipeline holds as many micro batches as there are stages, of its share of the layers.
    layers = sizes.layers if parallel.pipeline == 1 else -(-sizes.layers // parallel.pipeline) * parallel.pipeline
    # A norm keeps its input in fp32, and what it multiplies by its weight; tensor parallelism does not split it.
    norms = sizes.normed_per_token * tokens * (4 + width)
    saved = sizes.saved_per_token + (sizes.repeated_per_token if _repeats_heads(stage) else 0)
    at_work = saved // parallel.tensor * tokens * width + norms
    layer_input = sizes.hidden * tokens * width
    if stage.activation_checkpointing == "none":
        return layers * at_work, 0
    if stage.activation_checkpointing == "offload":
        # One input comes back while the layer above is at work.
        return 2 * layer_input + at_work, layers * layer_input
    matmuls = 2 * layer_input + sizes.matmuls_per_token // parallel.tensor * tokens * width
    kept = layer_input + (matmuls if stage.activation_checkpointing == "selective" else 0)
    return layers * kept + at_work, 0


def _repeats_heads(stage: Stage) -> bool:
    """The kernel that reads shared key and value heads where they are takes neither a mask nor fp32."""
    return stage.kind == "sft" or stage.precision == "fp32"


def _mask(stage: Stage) -> int:
    """Packed conversations do not see each other: a boolean for each pair of positions, which attention adds as a number."""
    pairs = stage.micro_batch_size * stage.sequence_length**2
    return pairs * (1 + COMPUTE_BYTES[stage.precision]) if stage.kind == "sft" else 0


def _logits(stage: Stage, sizes: ModelSize) -> int:
    """A chunk's logits, as they come, in fp32 and their softmax; the head's two gradients, made on the way forward.

    Of several chunks the weight's gradient is summed in fp32; the products, and in the end the sum, are there in the stage's
    precision, too, when the fp32 logits are gone.
    """
    tokens = stage.micro_batch_size * stage.sequence_length // stage.parallel.sequence
    width = COMPUTE_BYTES[stage.precision]
    vocabulary = sizes.vocab_size // stage.parallel.tensor
    rows = min(tokens, LOSS_CHUNK_TOKENS)
    chunk = rows * vocabulary * (8 if width == 4 else width + 8)
    weight = vocabulary * sizes.hidden
    if width == 4 or tokens <= LOSS_CHUNK_TOKENS:
        return chunk + (tokens * sizes.hidden + weight) * width
    return max(chunk, rows * vocabulary * width + weight * width) + 4 * weight + tokens * sizes.hidden * width


def _buckets(stage: Stage, parameters: int) -> int:
    if stage.communication.powersgd:
        # In fp32: the lost part of all gradients, before and after the step; of a bucket, gradients and their copy.
        return 4 * (2 * parameters + 2 * min(POWERSGD_BUCKET, parameters))
    zero = stage.zero
    if zero.stage == 0 or not zero.contiguous_gradients:
        return 0
    # Of two, one fills while the other is reduced. ZeRO-3 has one, as its gradients are taken out of it at once.
    count = 2 if zero.stage < 3 and zero.overlap_comm else 1
    return count * COMPUTE_BYTES[stage.precision] * (zero.reduce_bucket_size or _DEFAULT_BUCKET)
