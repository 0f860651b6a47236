"""Memory of one GPU while it trains a stage, estimated from sizes alone; nothing is allocated."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from longhaul.config.geometry import Geometry
from longhaul.config.models import Stage

GIB = 2**30
_COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# DeepSpeed's default bucket (elements), used twice: one fills while the other is reduced.
_DEFAULT_BUCKET = 500_000_000
# DeepSpeed's default of stage3_max_live_parameters.
_MAX_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU; `gathered` are ZeRO-3's whole weights in use; `host` is the CPU memory offload needs per rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gathered: int
    buckets: int
    host: int

    @property
    def states(self) -> int:
        """What must be there before the first token: weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.states + self.activations + self.logits + self.gathered + self.buckets

    def as_gib(self) -> dict[str, float]:
        """Every part and the total, in GiB."""
        return {key: round(value / GIB, 3) for key, value in {**asdict(self), "total": self.total}.items()}


def estimate(stage: Stage, sizes: Geometry, data_parallel: int) -> Memory:
    """Memory of one rank. Model states as in ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3)."""
    weights, gradients, optimizer, host = _model_states(stage, sizes.total, data_parallel)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=_activations(stage, sizes),
        logits=_logits(stage, sizes),
        gathered=_gathered(stage, sizes),
        buckets=_buckets(stage, sizes, data_parallel),
        host=host,
    )


def _model_states(stage: Stage, parameters: int, ranks: int) -> tuple[int, int, int, int]:
    """(weights, gradients, optimizer, host) in bytes; ZeRO >= 1 keeps fp32 masters beside the two moments."""
    zero, width = stage.zero, _COMPUTE_BYTES[stage.precision]
    weights = width * parameters // (ranks if zero.stage == 3 else 1)
    gradients = width * parameters // (ranks if zero.stage >= 2 else 1)
    optimizer = 12 * parameters // ranks if zero.stage >= 1 else 8 * parameters
    host = 0
    if zero.offload_optimizer == "cpu":
        # The gradients of offloaded states go to the host in fp32.
        host, optimizer = optimizer + 4 * parameters // ranks, 0
    if zero.offload_param == "cpu":
        host, weights = host + weights, 0
    return weights, gradients, optimizer, host


def _gathered(stage: Stage, sizes: Geometry) -> int:
    """ZeRO-3 holds at least the layer at work whole, and prefetches up to DeepSpeed's stage3_max_live_parameters."""
    if stage.zero.stage < 3:
        return 0
    return _COMPUTE_BYTES[stage.precision] * max(sizes.layer_max, min(sizes.total, _MAX_LIVE_PARAMETERS))


def _activations(stage: Stage, sizes: Geometry) -> int:
    tokens, width = stage.micro_batch * stage.sequence_length, _COMPUTE_BYTES[stage.precision]
    one_layer = sizes.saved_per_token * tokens * width
    if stage.activation_checkpointing:
        return sizes.layers * sizes.hidden * tokens * width + one_layer
    return sizes.layers * one_layer


def _logits(stage: Stage, sizes: Geometry) -> int:
    """Logits in compute precision, in fp32, and their fp32 gradient."""
    return stage.micro_batch * stage.sequence_length * sizes.vocab_size * (_COMPUTE_BYTES[stage.precision] + 8)


def _buckets(stage: Stage, sizes: Geometry, ranks: int) -> int:
    if ranks == 1 or stage.zero.stage == 0:
        return 0
    bucket = stage.zero.reduce_bucket_size or _DEFAULT_BUCKET
    return 2 * _COMPUTE_BYTES[stage.precision] * min(bucket, sizes.total)
