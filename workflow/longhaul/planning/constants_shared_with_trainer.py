"""Constants that plan and trainer share: tokens per loss chunk and reference prompt, PowerSGD bucket size, sizes of swapping."""

from __future__ import annotations

from longhaul.config.model_size import ModelSize

COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
"""Bytes per element of weights, activations and gradients in each precision. fp8 rounds only the operands of matrix products."""

FP8_MULTIPLE = 16
"""FP8 units multiply matrices whose sizes are multiples of this number."""

LOSS_CHUNK_TOKENS = 2048
"""Tokens whose logits exist at the same time (train/loss.py). With this many rows, matmuls are as fast as with all rows."""

COMPILED_LOSS_CHUNK_TOKENS = 2 * LOSS_CHUNK_TOKENS
"""The same for the compiled loss, which has 4 bytes for each logit in place of 10: none of them exists in fp32."""

POWERSGD_BUCKET_ELEMENTS = 25_000_000
"""Elements that PowerSGD compresses at once (train/powersgd.py). Its saved state has one entry per bucket, so this is no config
key: a checkpoint could not be resumed after a change."""

SWAP_SUB_GROUP_ELEMENTS = 100_000_000
"""Elements of one sub-group if the optimizer is on disk: DeepSpeed updates one sub-group after the other (sub_group_size).
DeepSpeed's default is ten times larger and would lock 16 GB of memory for each rank."""

SWAP_OPTIMIZER_BUFFERS = 4
"""Buffers for a sub-group of an optimizer on disk: master weights, two moments and gradients (buffer_count)."""

SWAP_MIN_BYTES = 1 << 20
"""Minimum size of a rank's partition of a tensor that is swapped to disk; smaller ones stay in CPU memory. A test compares it
with DeepSpeed's MIN_AIO_BYTES."""

SWAP_PARAM_BUFFERS = 8
"""Buffers for weights on disk, one partition each (buffer_count). The module in use needs at most two, one for each of its
weights."""

LOGITS_PROMPT_TOKENS = 32
"""Tokens of each prompt whose logits the trainer writes as reference values; a served model scores these prompts, too."""


def swap_param_buffer_elements(sizes: ModelSize, ranks: int) -> int:
    """Return the elements of one buffer for weights on disk: a rank's partition of the largest tensor (buffer_size)."""
    return -(-sizes.largest_tensor // ranks)
