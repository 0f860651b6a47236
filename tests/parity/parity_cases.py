"""The cases of the parity table: small models, the layouts under which they train, and the bounds for each layout.

The plan allows the kinds of layouts that are listed here, and refuses all others. A case is (model, layout). It trains 10 steps
in fp32 with the trainer that users run. Seed and order of samples are those of the plain PyTorch loop in reference_loop.py;
losses, gradient norms and the validation loss must agree to 1e-5 relative. Then the last checkpoint is exported and verified,
and the logits of the export are compared with those of the reference loop's model.
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
# Family -> keys of the stage that balance experts; the loss is large enough to show in the gradient norms of every case.
BALANCE_LOSS = {"sequence_aux_loss_coef": 0.1}
BALANCE: dict[str, dict[str, float]] = {
    "qwen3_moe": BALANCE_LOSS,
    "deepseek_v2": BALANCE_LOSS,
    "deepseek_v3": {**BALANCE_LOSS, "router_bias_update_rate": 0.01},
}
# Keys that use other modules: dropout, tied embeddings, biases, queries that are not compressed, dense and sparse layers in turn.
_LITE = {**LATENT, "q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": True, "n_shared_experts": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama, dropout": {"llama": {**SIZES, "attention_dropout": 0.2}},
    "qwen2, tied": {"qwen2": {**SIZES, "tie_word_embeddings": True, "num_hidden_layers": 3}},
    "qwen3_moe, sparse": {
        "qwen3_moe": {
            **MODELS["qwen3_moe"]["qwen3_moe"],
            "attention_bias": True,
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
        }
    },
    "deepseek_v3, lite": {"deepseek_v3": {**_LITE, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}},
    "deepseek_v2, lite": {"deepseek_v2": _LITE},
}
MODELS |= VARIANTS
ALL_LAYOUT_MODELS = ("llama", "qwen3", "qwen3_moe", "deepseek_v3")
"""The models that train under every layout. The other models consist of the same modules; they train under a few layouts."""
GLOBAL_BATCH = 8
# eps is larger than usual. With 1e-8, Adam turns the rounding of a gradient near zero into a step of full size (experts with few
# tokens have such gradients), and the bounds would test that instead of the layout.
OPTIMIZER = {"lr": 3e-3, "weight_decay": 0.1, "gradient_clipping": 0.5, "eps": 1e-6}
CHATS = {"kind": "sft", "dataset": "chats"}
TASKS: dict[str, dict[str, Any]] = {
    "chats": CHATS,
    "texts": {"kind": "pretrain", "dataset": "texts"},
    "not clipped": {**CHATS, "optimizer": {**OPTIMIZER, "gradient_clipping": 0.0}},
}
"""Name -> keys of the stage that change what is trained."""

Case = tuple[str, str]
"""(model, layout): keys of MODELS and LAYOUTS."""


@dataclass(frozen=True)
class Bounds:
    """Upper bounds of the relative differences from the fp32 reference.

    loss: of all steps, and the validation loss after the last; norm: of all steps; logits: after the last step
    """

    loss: float
    norm: float
    logits: float


FP32 = Bounds(loss=1e-5, norm=1e-5, logits=1e-4)
"""Sums over ranks are rounded in another order. Adam divides by the root of the second moment, so the rounding of a gradient
near zero changes a weight. Therefore logits differ more than losses. (The verification of the export is stricter: it compares
the exported model with the trainer's own logits.)"""
BF16 = Bounds(loss=2e-2, norm=2e-1, logits=float("inf"))
"""bf16 has 8 significant bits. The router may choose another expert for a token, so logits have no useful bound. The verification
of the export has its own bound. The fp32 cases check the arithmetic of the layout."""


@dataclass(frozen=True)
class Layout:
    """A parallel layout: the number of ranks, the config keys of the stage, the models that train under it, and their task."""

    ranks: int
    stage: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ALL_LAYOUT_MODELS
    bounds: Bounds = FP32
    task: str = "chats"


def _layout(
    ranks: int,
    zero_stage: int,
    micro_batch: int = 1,
    models: tuple[str, ...] = ALL_LAYOUT_MODELS,
    zero_keys: dict[str, Any] | None = None,
    stage_keys: dict[str, Any] | None = None,
    task: str = "chats",
    **axes: int,
) -> Layout:
    # As in large models, matrices are released after use. DeepSpeed keeps tensors of fewer than 100,000 elements.
    released = {"stage3_param_persistence_threshold": 100} if zero_stage == 3 else {}
    stage = {
        "zero": {"stage": zero_stage, **released, **(zero_keys or {})},
        "micro_batch_size": micro_batch,
        "parallel": axes,
        **(stage_keys or {}),
    }
    is_16_bit = stage.get("precision") == "bf16" or "communication" in stage
    return Layout(ranks, stage, models, BF16 if is_16_bit else FP32, task)


def _reduced_in(data_type: str) -> dict[str, Any]:
    return {"communication": {"data_type": data_type}}


SELECTIVE, RECOMPUTE, OFFLOADED = ({"activation_checkpointing": kind} for kind in ("selective", "full", "offload"))
BF16_PRECISION = {"precision": "bf16"}
CPU_OPTIMIZER = {"offload_optimizer": "cpu"}
NVME_OPTIMIZER = {"offload_optimizer": "nvme"}
NVME_ALL = {"offload_optimizer": "nvme", "offload_param": "nvme"}
CPU_ALL = {"offload_optimizer": "cpu", "offload_param": "cpu"}
MOE_MODELS = ("qwen3_moe", "deepseek_v3")
# Features that act together, each with the models that use them. "texts" and "not clipped" are tasks of their own.
_SMALL_BUCKETS = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
_PLAIN = {"overlap_comm": False, "contiguous_gradients": False}
_SMALL_BUCKETS_3 = {
    "reduce_bucket_size": 40_000,
    "stage3_prefetch_bucket_size": 100,
    "stage3_max_live_parameters": 1000,
    "stage3_max_reuse_distance": 0,
}
COMBINATIONS: dict[str, Layout] = {
    "pipeline 2, selective recompute": _layout(2, 1, 1, MOE_MODELS, pipeline=2, stage_keys=SELECTIVE),
    "pipeline 2, tensor 2, selective recompute": _layout(
        4, 1, 1, ("llama", "deepseek_v3"), pipeline=2, tensor=2, stage_keys=SELECTIVE
    ),
    "expert 2, pipeline 2, recompute": _layout(4, 1, 1, ("deepseek_v3",), expert=2, pipeline=2, stage_keys=RECOMPUTE),
    "data 2, ZeRO 3, selective recompute": _layout(2, 3, 1, ("llama", "qwen2", "deepseek_v3"), stage_keys=SELECTIVE),
    "data 2, ZeRO 3, activations offloaded": _layout(2, 3, 1, ("llama", "qwen3_moe"), stage_keys=OFFLOADED),
    "data 4, ZeRO 3, hpZ 2, selective recompute": _layout(
        4, 3, 1, ("qwen2", "deepseek_v3"), zero_keys={"zero_hpz_partition_size": 2}, stage_keys=SELECTIVE
    ),
    "tensor 2, ZeRO 3, selective recompute": _layout(2, 3, 2, ("llama", "deepseek_v3"), tensor=2, stage_keys=SELECTIVE),
    "tensor 2, data 2, ZeRO 3, recompute": _layout(4, 3, 1, ("llama", "deepseek_v3"), tensor=2, stage_keys=RECOMPUTE),
    "expert 2, activations offloaded": _layout(2, 2, 1, ("deepseek_v3",), expert=2, stage_keys=OFFLOADED),
    "expert 2, data 4, ZeRO 3, selective recompute": _layout(4, 3, 1, MOE_MODELS, expert=2, stage_keys=SELECTIVE),
    "sequence 2, ZeRO 2, recompute": _layout(2, 2, 4, ("qwen3", "deepseek_v3"), sequence=2, stage_keys=RECOMPUTE),
    "sequence 2, data 2, ZeRO 3, selective recompute": _layout(
        4, 3, 2, ("llama", "deepseek_v3"), sequence=2, stage_keys=SELECTIVE
    ),
    "sequence 2, ZeRO 0": _layout(2, 0, 4, ("qwen2", "deepseek_v3"), sequence=2),
    "sequence 2, data 2, ZeRO 2, optimizer offloaded": _layout(
        4, 2, 1, ("qwen3",), sequence=2, zero_keys=CPU_OPTIMIZER
    ),
    "expert 2, data 4, micro batch 1": _layout(4, 1, 1, MOE_MODELS, expert=2),
    "expert 2, data 4, ZeRO 2, micro batch 1": _layout(4, 2, 1, MOE_MODELS, expert=2),
    "expert 2, data 4, ZeRO 3, micro batch 1": _layout(4, 3, 1, MOE_MODELS, expert=2),
    "expert 2, ZeRO 2, optimizer offloaded": _layout(2, 2, 1, ("deepseek_v3",), expert=2, zero_keys=CPU_OPTIMIZER),
    "data 2, ZeRO 1, small buckets": _layout(2, 1, 1, ("qwen3_moe",), zero_keys=_SMALL_BUCKETS),
    "data 2, ZeRO 2, small buckets": _layout(2, 2, 1, ("llama", "qwen3"), zero_keys=_SMALL_BUCKETS),
    "data 2, ZeRO 2, small buckets, no overlap": _layout(
        2, 2, 1, ("llama", "qwen3_moe"), zero_keys={**_SMALL_BUCKETS, **_PLAIN}
    ),
    "expert 2, data 4, ZeRO 2, small buckets, no overlap": _layout(
        4, 2, 1, MOE_MODELS, expert=2, zero_keys={**_SMALL_BUCKETS, "overlap_comm": False}
    ),
    "data 2, ZeRO 1, small buckets, no overlap": _layout(
        2, 1, 1, ("llama", "qwen3_moe"), zero_keys={**_SMALL_BUCKETS, **_PLAIN}
    ),
    "data 2, ZeRO 3, small buckets, no overlap": _layout(
        2, 3, 1, ("llama", "qwen3_moe"), zero_keys={**_SMALL_BUCKETS_3, **_PLAIN}
    ),
    "pipeline 2, micro batch 8": _layout(2, 1, 8, ("llama", "deepseek_v3"), pipeline=2),
    "pipeline 4, experts on three ranks": _layout(4, 1, 2, MOE_MODELS, pipeline=4),
    "data 2, ZeRO 3, weights offloaded": _layout(2, 3, 1, ("qwen3_moe",), zero_keys={"offload_param": "cpu"}),
    "data 2, ZeRO 3, all on a disk": _layout(2, 3, 1, ("llama", "qwen3"), zero_keys=NVME_ALL),
    "data 4, ZeRO 3, hpZ 2, optimizer offloaded": _layout(
        4, 3, 1, ("qwen3",), zero_keys={"zero_hpz_partition_size": 2, **CPU_OPTIMIZER}
    ),
    "data 2, ZeRO 0, not clipped": _layout(2, 0, 2, ("llama",), task="not clipped"),
    "data 2, ZeRO 1, not clipped": _layout(2, 1, 2, ("llama",), task="not clipped"),
    "data 2, ZeRO 2, optimizer offloaded, not clipped": _layout(
        2, 2, 2, ("llama",), zero_keys=CPU_OPTIMIZER, task="not clipped"
    ),
    "data 2, ZeRO 3, not clipped": _layout(2, 3, 2, ("llama",), task="not clipped"),
    "pipeline 2, not clipped": _layout(2, 1, 2, ("llama",), pipeline=2, task="not clipped"),
    "expert 2, ZeRO 2, not clipped": _layout(2, 2, 2, ("qwen3_moe",), expert=2, task="not clipped"),
    "data 2, ZeRO 3, texts": _layout(2, 3, 2, ("llama",), task="texts"),
    "tensor 2, texts": _layout(2, 1, 2, ("qwen3",), tensor=2, task="texts"),
    "pipeline 2, texts": _layout(2, 1, 1, ("llama",), pipeline=2, task="texts"),
    "sequence 2, texts": _layout(2, 1, 2, ("llama",), sequence=2, task="texts"),
    # The reference loop draws the numbers of one rank and one micro batch.
    "one rank, selective recompute": _layout(1, 1, 8, ("llama, dropout",), stage_keys=SELECTIVE),
    "one rank, recompute": _layout(1, 1, 8, ("llama, dropout",), stage_keys=RECOMPUTE),
    "one rank, ZeRO 3, activations offloaded": _layout(1, 3, 8, ("llama, dropout",), stage_keys=OFFLOADED),
}
LAYOUTS: dict[str, Layout] = {
    "one rank": _layout(1, 0, 8),
    "one rank, micro batch 1": _layout(1, 1),
    "data 2, ZeRO 0": _layout(2, 0, 2),
    "data 2, ZeRO 1": _layout(2, 1, 4),
    "data 4, ZeRO 2": _layout(4, 2),
    "data 2, ZeRO 3": _layout(2, 3),
    "data 4, ZeRO 3": _layout(4, 3, 2),
    "data 4, ZeRO 3, recompute": _layout(4, 3, stage_keys={"activation_checkpointing": "full"}),
    "data 4, ZeRO 3, hpZ 2": _layout(4, 3, zero_keys={"zero_hpz_partition_size": 2}),
    "data 2, ZeRO 2, optimizer offloaded": _layout(2, 2, 2, zero_keys=CPU_OPTIMIZER),
    "data 2, ZeRO 3, all offloaded": _layout(2, 3, 2, zero_keys=CPU_ALL),
    "data 2, ZeRO 3, optimizer on a disk": _layout(2, 3, 2, zero_keys=NVME_OPTIMIZER),
    "data 2, ZeRO 0, gradients reduced in bf16": _layout(2, 0, 2, stage_keys=_reduced_in("bf16")),
    "data 2, ZeRO 1, gradients reduced in fp16": _layout(2, 1, 2, stage_keys=_reduced_in("fp16")),
    "data 2, ZeRO 2, gradients reduced in bf16": _layout(2, 2, 2, stage_keys=_reduced_in("bf16")),
    "data 2, ZeRO 3, gradients reduced in fp16": _layout(2, 3, 2, stage_keys=_reduced_in("fp16")),
    "tensor 2": _layout(2, 1, 2, tensor=2),
    "tensor 2, data 2, ZeRO 2": _layout(4, 2, 2, tensor=2),
    "pipeline 2": _layout(2, 1, 2, pipeline=2),
    "pipeline 2, data 2": _layout(4, 1, 1, pipeline=2),
    "pipeline 4": _layout(4, 1, 1, pipeline=4, models=("llama", "qwen3")),
    "pipeline 2, recompute": _layout(2, 1, 2, pipeline=2, stage_keys={"activation_checkpointing": "full"}),
    "data 2, ZeRO 2, selective recompute": _layout(2, 2, 2, stage_keys={"activation_checkpointing": "selective"}),
    "tensor 2, selective recompute": _layout(2, 1, 2, tensor=2, stage_keys={"activation_checkpointing": "selective"}),
    "pipeline 2, activations offloaded": _layout(
        2, 1, 2, pipeline=2, stage_keys={"activation_checkpointing": "offload"}
    ),
    "pipeline 2, tensor 2": _layout(4, 1, 2, pipeline=2, tensor=2),
    "pipeline 2, tensor 2, data 2": _layout(8, 1, 1, pipeline=2, tensor=2),
    "expert 2": _layout(2, 1, 2, MOE_MODELS, expert=2),
    "expert 2, data 4, ZeRO 2": _layout(4, 2, 2, MOE_MODELS, expert=2),
    "expert 4": _layout(4, 1, 1, MOE_MODELS, expert=4),
    "expert 2, tensor 2": _layout(4, 1, 2, MOE_MODELS, expert=2, tensor=2),
    "expert 2, pipeline 2": _layout(4, 1, 2, MOE_MODELS, expert=2, pipeline=2),
    "expert 2, pipeline 2, tensor 2": _layout(8, 1, 2, MOE_MODELS, expert=2, pipeline=2, tensor=2),
    "expert 2, data 4, ZeRO 3": _layout(4, 3, 2, MOE_MODELS, expert=2),
    "expert 2, tensor 2, ZeRO 3": _layout(4, 3, 2, MOE_MODELS, expert=2, tensor=2),
    "expert 2, data 4, ZeRO 3, recompute": _layout(
        4, 3, 2, MOE_MODELS, expert=2, stage_keys={"activation_checkpointing": "full"}
    ),
    "expert 2, data 4, ZeRO 3, bf16": _layout(4, 3, 2, MOE_MODELS, expert=2, stage_keys=BF16_PRECISION),
    "expert 4, ZeRO 3": _layout(4, 3, 1, MOE_MODELS, expert=4),
    "tensor 2, data 2, ZeRO 3": _layout(4, 3, 2, tensor=2),
    "tensor 2, ZeRO 3": _layout(2, 3, 2, tensor=2),
    "tensor 2, data 2, ZeRO 3, all offloaded": _layout(4, 3, 2, tensor=2, zero_keys=CPU_ALL),
    "tensor 2, data 2, optimizer offloaded": _layout(4, 1, 2, tensor=2, zero_keys=CPU_OPTIMIZER),
    "pipeline 2, data 2, optimizer offloaded": _layout(4, 1, 1, pipeline=2, zero_keys=CPU_OPTIMIZER),
    "expert 2, data 4, ZeRO 2, optimizer offloaded": _layout(4, 2, 2, MOE_MODELS, expert=2, zero_keys=CPU_OPTIMIZER),
    "expert 2, data 4, ZeRO 3, all offloaded": _layout(4, 3, 2, MOE_MODELS, expert=2, zero_keys=CPU_ALL),
    "tensor 2, data 2, ZeRO 3, optimizer on a disk": _layout(4, 3, 2, tensor=2, zero_keys=NVME_OPTIMIZER),
    "expert 2, data 4, ZeRO 3, optimizer on a disk": _layout(4, 3, 2, MOE_MODELS, expert=2, zero_keys=NVME_OPTIMIZER),
    "sequence 2": _layout(2, 1, 4, sequence=2),
    "sequence 2, data 2, ZeRO 3": _layout(4, 3, 2, sequence=2),
    "sequence 2, data 2, ZeRO 3, optimizer on a disk": _layout(4, 3, 2, sequence=2, zero_keys=NVME_OPTIMIZER),
    "data 2, ZeRO 1, bf16": _layout(2, 1, 2, stage_keys=BF16_PRECISION),
    "data 2, ZeRO 3, bf16": _layout(2, 3, 2, stage_keys=BF16_PRECISION),
    "data 2, ZeRO 3, optimizer on a disk, bf16": _layout(2, 3, 2, zero_keys=NVME_OPTIMIZER, stage_keys=BF16_PRECISION),
    "tensor 2, bf16": _layout(2, 1, 2, tensor=2, stage_keys=BF16_PRECISION),
    "pipeline 2, bf16": _layout(2, 1, 2, pipeline=2, stage_keys=BF16_PRECISION),
    "expert 2, bf16": _layout(2, 1, 2, MOE_MODELS, expert=2, stage_keys=BF16_PRECISION),
    "sequence 2, bf16": _layout(2, 1, 2, sequence=2, stage_keys=BF16_PRECISION),
    "expert 2, pipeline 2, bf16": _layout(4, 1, 2, MOE_MODELS, expert=2, pipeline=2, stage_keys=BF16_PRECISION),
    **COMBINATIONS,
}
# Cases that `make test` trains: every axis once, with the model that uses most of the axis.
TEST_SUBSET = (
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


# Models that share modules with the others: the layouts that slice these modules.
RELATED_MODELS = {
    "qwen2": (
        "one rank",
        "data 2, ZeRO 3",
        "tensor 2",
        "tensor 2, ZeRO 3",
        "pipeline 2",
        "pipeline 2, tensor 2",
        "sequence 2",
    ),
    "deepseek_v2": (
        "one rank",
        "data 2, ZeRO 3",
        "tensor 2",
        "pipeline 2",
        "expert 2",
        "expert 2, tensor 2, ZeRO 3",
        "sequence 2",
    ),
    "llama, dropout": ("one rank",),
    "qwen2, tied": ("data 2, ZeRO 3", "pipeline 2, tensor 2"),
    "qwen3_moe, sparse": (
        "tensor 2, ZeRO 3",
        "sequence 2",
        "expert 2, pipeline 2",
        "expert 2, tensor 2",
        "expert 2, data 4, ZeRO 3",
    ),
    "deepseek_v3, lite": (
        "data 2, ZeRO 3",
        "pipeline 2, tensor 2",
        "tensor 2, ZeRO 3",
        "sequence 2",
        "expert 2, pipeline 2",
        "expert 2, tensor 2",
        "expert 2, data 4, ZeRO 3",
    ),
    "deepseek_v2, lite": ("pipeline 2, tensor 2", "expert 2, tensor 2"),
}


TABLES: dict[str, list[Case]] = {
    "parity": [(model, name) for name, layout in LAYOUTS.items() for model in layout.models],
    "parity_relatives": [(model, name) for model, names in RELATED_MODELS.items() for name in names],
}
"""Name of the record below bench/results -> its cases."""


def all_cases() -> list[Case]:
    """Return the cases of both tables."""
    return [case for cases in TABLES.values() for case in cases]
