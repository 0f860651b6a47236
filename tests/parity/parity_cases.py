"""The parity table: every twin model under every layout that is proved, by name. The plan allows these kinds and no others.

A cell trains 10 steps in fp32 from one seed on one order of samples, through the trainer that users run, and is compared
with the plain PyTorch loop of reference.py: losses and gradient norms agree to 1e-5 relative. Then its last checkpoint is
exported, proved, and its logits compared with those of the reference's weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"llama": {**SIZES, "attention_bias": True, "mlp_bias": True}},
    "qwen3": {"qwen3": {**SIZES, "head_dim": 16, "tie_word_embeddings": True}},
    "qwen3_moe": {
        "qwen3_moe": {
            **SIZES,
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        }
    },
    "deepseek_v3": {"deepseek_v3": {**LATENT, "q_lora_rank": 32, "n_group": 2, "topk_group": 1}},
    "qwen2": {"qwen2": SIZES},
    "deepseek_v2": {
        "deepseek_v2": {
            **LATENT,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "group_limited_greedy",
            "q_lora_rank": 32,
        }
    },
}
TWINS = ("llama", "qwen3", "qwen3_moe", "deepseek_v3")
"""Those that train under every layout; the others have their parts, and train where a part is split."""
GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences from the fp32 reference over all steps; logits are those after the last step."""

    loss: float
    norm: float
    logits: float


FP32 = Bounds(loss=1e-5, norm=1e-5, logits=1e-4)
"""Sums over ranks round in another order. Adam divides by the root of the second moment, so that the rounding of a gradient
near zero moves a weight, and logits drift further apart than losses. (The proof of the export is stricter: it compares the
exported model with the trainer's own logits.)"""
BF16 = Bounds(loss=2e-2, norm=2e-1, logits=float("inf"))
"""8 significant bits, against fp32: a token of a mixture may go to another expert, which no small bound on a logit survives.
The export's proof has its own bound; the arithmetic of the layout is what the fp32 cells prove."""


@dataclass(frozen=True)
class Layout:
    """How a stage is spread: `ranks` processes, and the stage's keys that say so."""

    ranks: int
    stage: dict[str, Any] = field(default_factory=dict)
    twins: tuple[str, ...] = TWINS
    bounds: Bounds = FP32


def _layout(ranks: int, zero: int, micro: int = 1, twins: tuple[str, ...] = TWINS, **axes: Any) -> Layout:
    more = axes.pop("more", {})
    zero_keys = {"stage": zero, **axes.pop("zero_more", {})}
    stage = {"zero": zero_keys, "micro_batch_size": micro, "parallel": axes, **more}
    halved = more.get("precision") == "bf16" or "communication" in more
    return Layout(ranks, stage, twins, BF16 if halved else FP32)


def _sent_in(data_type: str) -> dict[str, Any]:
    return {"communication": {"data_type": data_type}}


HALF = {"precision": "bf16"}
OFFLOADED = {"offload_optimizer": "cpu"}
SWAPPED = {"offload_optimizer": "nvme"}
ALL_OFFLOADED = {"offload_optimizer": "cpu", "offload_param": "cpu"}
MIXTURES = ("qwen3_moe", "deepseek_v3")
LAYOUTS: dict[str, Layout] = {
    "one": _layout(1, 0, 8),
    "one, micro batch 1": _layout(1, 1),
    "data 2, ZeRO 0": _layout(2, 0, 2),
    "data 2, ZeRO 1": _layout(2, 1, 4),
    "data 4, ZeRO 2": _layout(4, 2),
    "data 2, ZeRO 3": _layout(2, 3),
    "data 4, ZeRO 3": _layout(4, 3, 2),
    "data 4, ZeRO 3, recompute": _layout(4, 3, more={"activation_checkpointing": "full"}),
    "data 4, ZeRO 3, hierarchical 2": _layout(4, 3, zero_more={"zero_hpz_partition_size": 2}),
    "data 2, ZeRO 2, optimizer offloaded": _layout(2, 2, 2, zero_more=OFFLOADED),
    "data 2, ZeRO 3, all offloaded": _layout(2, 3, 2, zero_more=ALL_OFFLOADED),
    "data 2, ZeRO 3, optimizer on a disk": _layout(2, 3, 2, zero_more=SWAPPED),
    "data 2, ZeRO 0, gradients sent in bf16": _layout(2, 0, 2, more=_sent_in("bf16")),
    "data 2, ZeRO 1, gradients sent in fp16": _layout(2, 1, 2, more=_sent_in("fp16")),
    "data 2, ZeRO 2, gradients sent in bf16": _layout(2, 2, 2, more=_sent_in("bf16")),
    "data 2, ZeRO 3, gradients sent in fp16": _layout(2, 3, 2, more=_sent_in("fp16")),
    "tensor 2": _layout(2, 1, 2, tensor=2),
    "tensor 2, data 2, ZeRO 2": _layout(4, 2, 2, tensor=2),
    "pipeline 2": _layout(2, 1, 2, pipeline=2),
    "pipeline 2, data 2": _layout(4, 1, 1, pipeline=2),
    "pipeline 4": _layout(4, 1, 1, pipeline=4, twins=("llama", "qwen3")),
    "pipeline 2, recompute": _layout(2, 1, 2, pipeline=2, more={"activation_checkpointing": "full"}),
    "data 2, ZeRO 2, selective recompute": _layout(2, 2, 2, more={"activation_checkpointing": "selective"}),
    "tensor 2, selective recompute": _layout(2, 1, 2, tensor=2, more={"activation_checkpointing": "selective"}),
    "pipeline 2, activations offloaded": _layout(2, 1, 2, pipeline=2, more={"activation_checkpointing": "offload"}),
    "pipeline 2, tensor 2": _layout(4, 1, 2, pipeline=2, tensor=2),
    "pipeline 2, tensor 2, data 2": _layout(8, 1, 1, pipeline=2, tensor=2),
    "expert 2": _layout(2, 1, 2, MIXTURES, expert=2),
    "expert 2, data 4, ZeRO 2": _layout(4, 2, 2, MIXTURES, expert=2),
    "expert 4": _layout(4, 1, 1, MIXTURES, expert=4),
    "expert 2, tensor 2": _layout(4, 1, 2, MIXTURES, expert=2, tensor=2),
    "expert 2, pipeline 2": _layout(4, 1, 2, MIXTURES, expert=2, pipeline=2),
    "expert 2, pipeline 2, tensor 2": _layout(8, 1, 2, MIXTURES, expert=2, pipeline=2, tensor=2),
    "expert 2, data 4, ZeRO 3": _layout(4, 3, 2, MIXTURES, expert=2),
    "expert 2, tensor 2, ZeRO 3": _layout(4, 3, 2, MIXTURES, expert=2, tensor=2),
    "expert 2, data 4, ZeRO 3, recompute": _layout(
        4, 3, 2, MIXTURES, expert=2, more={"activation_checkpointing": "full"}
    ),
    "expert 2, data 4, ZeRO 3, bf16": _layout(4, 3, 2, MIXTURES, expert=2, more=HALF),
    "expert 4, ZeRO 3": _layout(4, 3, 1, MIXTURES, expert=4),
    "tensor 2, data 2, ZeRO 3": _layout(4, 3, 2, tensor=2),
    "tensor 2, ZeRO 3": _layout(2, 3, 2, tensor=2),
    "tensor 2, data 2, ZeRO 3, all offloaded": _layout(4, 3, 2, tensor=2, zero_more=ALL_OFFLOADED),
    "tensor 2, data 2, optimizer offloaded": _layout(4, 1, 2, tensor=2, zero_more=OFFLOADED),
    "pipeline 2, data 2, optimizer offloaded": _layout(4, 1, 1, pipeline=2, zero_more=OFFLOADED),
    "expert 2, data 4, ZeRO 2, optimizer offloaded": _layout(4, 2, 2, MIXTURES, expert=2, zero_more=OFFLOADED),
    "expert 2, data 4, ZeRO 3, all offloaded": _layout(4, 3, 2, MIXTURES, expert=2, zero_more=ALL_OFFLOADED),
    "tensor 2, data 2, ZeRO 3, optimizer on a disk": _layout(4, 3, 2, tensor=2, zero_more=SWAPPED),
    "expert 2, data 4, ZeRO 3, optimizer on a disk": _layout(4, 3, 2, MIXTURES, expert=2, zero_more=SWAPPED),
    "sequence 2": _layout(2, 1, 4, sequence=2),
    "sequence 2, data 2, ZeRO 3": _layout(4, 3, 2, sequence=2),
    "sequence 2, data 2, ZeRO 3, optimizer on a disk": _layout(4, 3, 2, sequence=2, zero_more=SWAPPED),
    "data 2, ZeRO 1, bf16": _layout(2, 1, 2, more=HALF),
    "data 2, ZeRO 3, bf16": _layout(2, 3, 2, more=HALF),
    "data 2, ZeRO 3, optimizer on a disk, bf16": _layout(2, 3, 2, zero_more=SWAPPED, more=HALF),
    "tensor 2, bf16": _layout(2, 1, 2, tensor=2, more=HALF),
    "pipeline 2, bf16": _layout(2, 1, 2, pipeline=2, more=HALF),
    "expert 2, bf16": _layout(2, 1, 2, MIXTURES, expert=2, more=HALF),
    "sequence 2, bf16": _layout(2, 1, 2, sequence=2, more=HALF),
    "expert 2, pipeline 2, bf16": _layout(4, 1, 2, MIXTURES, expert=2, pipeline=2, more=HALF),
}
# Cells that `make test` trains: every axis once, and the twin that has the most to go wrong.
SUBSET = (
    ("llama", "tensor 2, data 2, ZeRO 2"),
    ("qwen3", "data 2, ZeRO 3, optimizer on a disk"),
    ("qwen3", "pipeline 2, data 2"),
    ("qwen3", "pipeline 2, tensor 2"),
    ("qwen3_moe", "expert 2, data 4, ZeRO 2"),
    ("deepseek_v3", "sequence 2, data 2, ZeRO 3"),
    ("deepseek_v3", "expert 2, tensor 2"),
    ("deepseek_v3", "expert 2, tensor 2, ZeRO 3"),
    ("deepseek_v3", "expert 2, pipeline 2"),
)


RELATIVES = {
    "qwen2": (
        "one",
        "data 2, ZeRO 3",
        "tensor 2",
        "tensor 2, ZeRO 3",
        "pipeline 2",
        "pipeline 2, tensor 2",
        "sequence 2",
    ),
    "deepseek_v2": (
        "one",
        "data 2, ZeRO 3",
        "tensor 2",
        "pipeline 2",
        "expert 2",
        "expert 2, tensor 2, ZeRO 3",
        "sequence 2",
    ),
}


TABLES: dict[str, list[tuple[str, str]]] = {
    "parity": [(twin, name) for name, layout in LAYOUTS.items() for twin in layout.twins],
    "parity_relatives": [(twin, name) for twin, names in RELATIVES.items() for name in names],
}


def cells() -> list[tuple[str, str]]:
    """Every (twin, layout) of both tables."""
    return [cell for table in TABLES.values() for cell in table]
