"""Memory of activations, attention masks and logits, compared with numbers computed by hand.

TINY_LLAMA, per token of one layer: 2·8 norm outputs, 2·(2+1)·4 = 24 in attention and 4·16 = 64 in the MLP are saved: 104
elements. Repeated keys and values add 2·(2-1)·4 = 8. Two norms have 16 elements. Matmuls and attention give 24 + 2·16 = 56.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from longhaul.config.stage_config import Parallel
from longhaul.planning.activation_memory import activation_bytes, attention_mask_bytes, logits_bytes
from tests.support.tiny_sizes import tiny_size, tiny_stage

TOKENS = 2 * 16
NORMS = 16 * TOKENS * (4 + 2)
LAYER = 104 * TOKENS * 2 + NORMS
LAYER_WITH_REPEATED_HEADS = (104 + 8) * TOKENS * 2 + NORMS
FP32_LAYER = (104 + 8) * TOKENS * 4 + 16 * TOKENS * (4 + 4)
INPUT = 8 * TOKENS * 2
SELECTIVE = INPUT + 2 * INPUT + 56 * TOKENS * 2
# changes of the stage, bytes on the GPU, bytes on the host; two layers
ACTIVATIONS: dict[str, tuple[dict[str, Any], int, int]] = {
    "none": ({}, 2 * LAYER, 0),
    "none in fp32": ({"precision": "fp32"}, 2 * FP32_LAYER, 0),
    "none with packed conversations": ({"kind": "sft"}, 2 * LAYER_WITH_REPEATED_HEADS, 0),
    "full": ({"activation_checkpointing": "full"}, 2 * INPUT + LAYER, 0),
    "selective": ({"activation_checkpointing": "selective"}, 2 * SELECTIVE + LAYER, 0),
    "offload": ({"activation_checkpointing": "offload"}, 2 * INPUT + LAYER, 2 * INPUT),
    "tensor parallelism splits all but norms": (
        {"parallel": Parallel(tensor=2)},
        2 * (52 * TOKENS * 2 + NORMS),
        0,
    ),
    "sequence parallelism splits tokens": ({"parallel": Parallel(sequence=2)}, LAYER, 0),
    "larger micro batch": ({"micro_batch_size": 6}, 3 * 2 * LAYER, 0),
}


@pytest.mark.parametrize(("changes", "gpu", "host"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_equal_hand_computed_bytes(changes: dict[str, Any], gpu: int, host: int):
    assert activation_bytes(tiny_stage(**changes), tiny_size()) == (gpu, host)


@pytest.mark.parametrize(("layers", "pipeline", "held"), [(2, 2, 2), (3, 2, 4), (4, 2, 4), (5, 4, 8)])
def test_first_pipeline_rank_holds_a_micro_batch_for_each_pipeline_rank(layers: int, pipeline: int, held: int):
    stage = tiny_stage(parallel=Parallel(pipeline=pipeline))
    assert activation_bytes(stage, tiny_size(num_hidden_layers=layers)) == (held * LAYER, 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "sft"}, 2 * 16 * 16 * (1 + 2)),
        ({"kind": "sft", "precision": "fp32"}, 2 * 16 * 16 * (1 + 4)),
        ({"kind": "sft", "sequence_length": 64}, 2 * 64 * 64 * (1 + 2)),
        ({"kind": "pretrain"}, 0),
    ],
)
def test_only_packed_conversations_have_an_attention_mask(changes: dict[str, Any], expected: int):
    assert attention_mask_bytes(tiny_stage(**changes)) == expected


LONG = {"sequence_length": 2048}  # 4096 tokens: two chunks
# changes of the stage, expected bytes; vocabulary 10, hidden size 8
LOGITS: dict[str, tuple[dict[str, Any], int]] = {
    "one chunk in bf16": ({}, TOKENS * 10 * (2 + 4 + 4) + (TOKENS * 8 + 10 * 8) * 2),
    "one chunk in fp32": ({"precision": "fp32"}, TOKENS * 10 * (4 + 4) + (TOKENS * 8 + 10 * 8) * 4),
    "one chunk, split vocabulary": (
        {"parallel": Parallel(tensor=2)},
        TOKENS * 5 * (2 + 4 + 4) + (TOKENS * 8 + 5 * 8) * 2,
    ),
    "exactly one chunk": ({"sequence_length": 1024}, 2048 * 10 * 10 + (2048 * 8 + 80) * 2),
    "two chunks in bf16": (LONG, 2048 * 10 * 10 + 4 * 80 + 4096 * 8 * 2),
    "two chunks in fp32": ({**LONG, "precision": "fp32"}, 2048 * 10 * 8 + (4096 * 8 + 80) * 4),
    "two chunks over two sequence-parallel ranks": (
        {**LONG, "parallel": Parallel(sequence=2)},
        2048 * 10 * 10 + (2048 * 8 + 80) * 2,
    ),
}


@pytest.mark.parametrize(("changes", "expected"), LOGITS.values(), ids=LOGITS)
def test_logits_equal_hand_computed_bytes(changes: dict[str, Any], expected: int):
    assert logits_bytes(tiny_stage(**changes), tiny_size()) == expected


def test_product_of_a_large_head_can_exceed_the_fp32_logits():
    """A head of 10 x 32768: its product in bf16 is larger than the chunk's logits in fp32 and their softmax."""
    sizes = replace(tiny_size(), hidden_size=32768)
    weight = 10 * 32768
    expected = (2048 * 10 * 2 + weight * 2) + 4 * weight + 4096 * 32768 * 2
    assert logits_bytes(tiny_stage(**LONG), sizes) == expected
