"""Memory of activations, attention masks and logits, compared with numbers computed by hand.

TINY_LLAMA, per token of one layer: 2·8 norm outputs, 2·(2+1)·4 = 24 in attention and 4·16 = 64 in the MLP are saved: 104
elements. Repeated keys and values add 2·(2-1)·4 = 8. Two norms have 16 elements. Matmuls and attention give 24 + 2·16 = 56.
A compiled layer recomputes 16 of the MLP, and saves the input of a norm without its fp32 copy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from longhaul.config.model_size import model_size
from longhaul.config.stage_config import Parallel
from longhaul.planning.activation_memory import activation_bytes, attention_mask_bytes, logits_bytes
from tests.support.tiny_model_sizes import TINY_QWEN3_MOE, tiny_size, tiny_stage

TOKENS = 2 * 16
NORMS = 16 * TOKENS * (4 + 2)
LAYER = 104 * TOKENS * 2 + NORMS
LAYER_WITH_REPEATED_HEADS = (104 + 8) * TOKENS * 2 + NORMS
FP32_LAYER = (104 + 8) * TOKENS * 4 + 16 * TOKENS * (4 + 4)
COMPILED_NORMS = 16 * TOKENS * 2
COMPILED = (104 - 16) * TOKENS * 2 + COMPILED_NORMS
COMPILED_FP32 = (104 - 16 + 8) * TOKENS * 4 + 16 * TOKENS * 4
INPUT = 8 * TOKENS * 2
SELECTIVE = INPUT + 2 * INPUT + 56 * TOKENS * 2
COMPILED_SELECTIVE = SELECTIVE - INPUT
OFF = {"compile": "off"}
# changes of the stage, bytes on the GPU, bytes on the host; two layers
ACTIVATIONS: dict[str, tuple[dict[str, Any], int, int]] = {
    "none": (OFF, 2 * LAYER, 0),
    "none in fp32": ({"precision": "fp32", **OFF}, 2 * FP32_LAYER, 0),
    "none with packed conversations": ({"kind": "sft", **OFF}, 2 * LAYER_WITH_REPEATED_HEADS, 0),
    "full": ({"activation_checkpointing": "full", **OFF}, 2 * INPUT + LAYER, 0),
    "selective": ({"activation_checkpointing": "selective", **OFF}, 2 * SELECTIVE + LAYER, 0),
    "compiled": ({}, 2 * COMPILED, 0),
    "compiled in fp32": ({"precision": "fp32"}, 2 * COMPILED_FP32, 0),
    "compiled, full": ({"activation_checkpointing": "full"}, 2 * INPUT + COMPILED, 0),
    "compiled, selective": ({"activation_checkpointing": "selective"}, 2 * COMPILED_SELECTIVE + COMPILED, 0),
    "offload, which is not compiled": ({"activation_checkpointing": "offload"}, 2 * INPUT + LAYER, 2 * INPUT),
    "tensor parallelism splits attention and MLP": (
        {"parallel": Parallel(tensor=2)},
        2 * (((24 + 3 * 16) // 2 + 16) * TOKENS * 2 + COMPILED_NORMS),
        0,
    ),
    "sequence parallelism splits tokens, and saves attention's output twice": (
        {"parallel": Parallel(sequence=2)},
        COMPILED + 8 * TOKENS * 2,
        0,
    ),
    "larger micro batch": ({"micro_batch_size": 6}, 3 * 2 * COMPILED, 0),
}


@pytest.mark.parametrize(("changes", "gpu", "host"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_equal_hand_computed_bytes(changes: dict[str, Any], gpu: int, host: int):
    assert activation_bytes(tiny_stage(**changes), tiny_size()) == (gpu, host)


def test_tensor_parallelism_does_not_split_the_outputs_of_experts():
    """Each of two ranks keeps half of what attention and the widths of experts give, and all rows of two experts."""
    divided = tiny_stage(activation_checkpointing="selective", parallel=Parallel(tensor=2))
    whole_layer = ((24 + 3 * 8) // 2 + 6 * 8) * TOKENS * 2 + (16 + 3 * 4) * TOKENS * 2
    kept = 2 * INPUT + ((24 + 2 * 8) // 2 + 2 * 8) * TOKENS * 2
    assert activation_bytes(divided, model_size(TINY_QWEN3_MOE)) == (2 * kept + whole_layer, 0)


@pytest.mark.parametrize(("layers", "pipeline", "held"), [(2, 2, 2), (3, 2, 4), (4, 2, 4), (5, 4, 8)])
def test_first_pipeline_rank_holds_a_micro_batch_for_each_pipeline_rank(layers: int, pipeline: int, held: int):
    stage = tiny_stage(parallel=Parallel(pipeline=pipeline))
    assert activation_bytes(stage, tiny_size(num_hidden_layers=layers)) == (held * COMPILED, 0)


def test_layers_are_not_compiled_on_cpus():
    assert activation_bytes(tiny_stage(), tiny_size(), on_gpus=False) == (2 * LAYER, 0)


@pytest.mark.parametrize(("ranks", "rows"), [(2, 4), (4, 4)])
@pytest.mark.parametrize("changes", [{}, OFF, {"activation_checkpointing": "full"}])
def test_expert_parallelism_adds_the_rows_of_an_exchange(changes: dict[str, Any], ranks: int, rows: int):
    """A token uses two experts, so it goes to two ranks at most: two rows there, two back."""
    sizes = model_size(TINY_QWEN3_MOE)
    divided, whole = (
        activation_bytes(tiny_stage(parallel=parallel, **changes), sizes)
        for parallel in (Parallel(expert=ranks), Parallel())
    )
    assert divided == (whole[0] + rows * INPUT, 0)


PACKS: dict[str, Any] = {"kind": "sft", "sequence_length": 128}
# changes of the stage, query heads, whether ranks have GPUs, saved elements per token. With heads of 16 elements: 2·8 + 64 as
# above, and 2·(2+1)·16 = 96 in attention. Repeated keys and values add 2·(2-1)·16 = 32.
SHARED_HEADS: dict[str, tuple[dict[str, Any], int, bool, int]] = {
    "FlexAttention shares heads": ({}, 2, True, 176 - 16),
    "CPUs repeat them": ({}, 2, False, 176 + 32),
    "so does the kernel with a mask": (OFF, 2, True, 176 + 32),
    "and the kernel of fp32": ({"precision": "fp32"}, 2, True, 176 - 16 + 32),
    "three heads are no power of two": ({}, 3, True, 80 - 16 + 2 * 4 * 16 + 2 * 2 * 16),
}


@pytest.mark.parametrize(("changes", "heads", "on_gpus", "elements"), SHARED_HEADS.values(), ids=SHARED_HEADS)
def test_packs_repeat_shared_heads_where_the_kernel_needs_it(
    changes: dict[str, Any], heads: int, on_gpus: bool, elements: int
):
    stage, sizes = tiny_stage(**PACKS, **changes), tiny_size(head_dim=16, num_attention_heads=heads)
    tokens, width = 2 * 128, 4 if stage.precision == "fp32" else 2
    copies = 4 if stage.compile == "off" or not on_gpus else 0
    expected = 2 * (elements * tokens * width + 16 * tokens * (copies + width))
    assert activation_bytes(stage, sizes, on_gpus) == (expected, 0)


MASK = 2 * 128 * 128 * (1 + 2)
# changes of the stage, changes of the model, whether ranks have GPUs, expected bytes
MASKS_OF_PACKS: dict[str, tuple[dict[str, Any], dict[str, Any], bool, int]] = {
    "one block": ({}, {}, True, 2 * 4 * (1 + 1) * 4),
    "four blocks": ({"sequence_length": 512}, {}, True, 2 * 4 * (16 + 4) * 4),
    "whole windows": ({"kind": "pretrain"}, {}, True, 0),
    "CPUs": ({}, {}, False, MASK),
    "compile: off": ({"compile": "off"}, {}, True, MASK),
    "activations on the CPU are not compiled": ({"activation_checkpointing": "offload"}, {}, True, MASK),
    "a part of a block": ({"sequence_length": 129}, {}, True, 2 * 129 * 129 * (1 + 2)),
    "small heads": ({}, {"head_dim": 8}, True, MASK),
    "dropout": ({}, {"attention_dropout": 0.1}, True, MASK),
    "sequence parallelism": ({"parallel": Parallel(sequence=2)}, {}, True, MASK),
}


@pytest.mark.parametrize(("changes", "model", "on_gpus", "expected"), MASKS_OF_PACKS.values(), ids=MASKS_OF_PACKS)
def test_masks_of_packs_follow_the_kernel(changes: dict[str, Any], model: dict[str, Any], on_gpus: bool, expected: int):
    sizes = tiny_size(**{"head_dim": 16, **model})
    assert attention_mask_bytes(tiny_stage(**{**PACKS, **changes}), sizes, on_gpus) == expected


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
    assert attention_mask_bytes(tiny_stage(**changes), tiny_size()) == expected


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
