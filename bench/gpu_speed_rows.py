"""The models, settings and peers that bench/gpu_speed.py measures: one row each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LOSS_STEPS = {"losses": 200, "curves": 1_000}
"""Group of rows that compare losses -> steps."""
ON_TWO = " on 2 GPUs"
_RECORDS = {"mixture": "_mixture", "8 B" + ON_TWO: "_2_8b", "mixture" + ON_TWO: "_2_mixture"}
"""Groups with records of their own, so that a run of one group erases no other."""
MODELS: dict[str, dict[str, Any]] = {
    "dense": {
        "llama": {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        }
    },
    "mixture": {
        "deepseek_v3": {
            "vocab_size": 64000,
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "moe_intermediate_size": 896,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 768,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        }
    },
    "losses": {
        "llama": {
            "vocab_size": 16384,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        }
    },
}
MODELS["curves"] = MODELS["losses"]
MODELS["8 B"] = {
    "llama": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    name:  <group>/<what runs>; a group is a model, with " on 2 GPUs" where that is so
    kind:  "longhaul", or a function of gpu_speed_peers.py
    stage: config of the stage, from which peers take their model and batches
    plain: one of the runs of a group that differ in rounding alone; the losses of all rows are compared with theirs
    kernels: "flash" for FlashAttention's kernel in place of cuDNN's, which torch prefers on an H100;
        "liger" for Liger's kernels of norms, rotary embeddings and SwiGLU in place of transformers' code
    """

    name: str
    kind: str
    stage: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    kernels: str = ""

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]

    @property
    def model(self) -> str:
        return self.group.removesuffix(ON_TWO)

    @property
    def gpus(self) -> int:
        return 2 if self.group.endswith(ON_TWO) else 1

    @property
    def record(self) -> str:
        """Return the end of the names of its records in bench/results/."""
        return _RECORDS.get(self.group, "_2" if self.gpus == 2 else "")

    @property
    def dataset(self) -> str:
        """Return the name of the dataset in `write_data` of gpu_speed.py."""
        if self.stage["kind"] == "sft":
            return "chat"
        return "sources" if self.model == "curves" else "corpus"


def _stage(micro_batch: int, steps: int = 1_000, **keys: Any) -> dict[str, Any]:
    return {
        "kind": "pretrain",
        "steps": steps,
        "global_batch_size": micro_batch,
        "micro_batch_size": micro_batch,
        "sequence_length": 4096,
        "optimizer": {"lr": 3e-4},
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "zero": {"stage": 1},
        "validation": {"every_steps": steps},
        "checkpoints": {"every_steps": steps},
        **keys,
    }


def _two(stage: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {**stage, "gpus_per_node": 2, "global_batch_size": 2 * stage["micro_batch_size"], **keys}


def _losses(**keys: Any) -> dict[str, Any]:
    # A short warm-up makes a large batch chaotic: on two GPUs, losses of the same settings with other kernels differed by 0.04.
    return _stage(4, LOSS_STEPS["losses"], schedule={"kind": "constant", "warmup_steps": 50}, **keys)


def _curves(**keys: Any) -> dict[str, Any]:
    return _stage(4, LOSS_STEPS["curves"], **keys)


def _plain_runs(group: str, stage: dict[str, Any]) -> list[Row]:
    """Return the same training with other kernels and three sizes of matrix products.

    How much these five differ from each other shows what rounding alone does to the losses. With several micro batches,
    DeepSpeed adds their gradients in the stage's precision.
    """
    stage = {**stage, "compile": "off"}
    name = f"{group}/longhaul, plain"
    kernels = {"": "", ", other attention kernel": "flash", ", Liger kernels": "liger"}
    return [
        *(Row(name + end, "longhaul", stage, plain=True, kernels=kind) for end, kind in kernels.items()),
        *(
            Row(f"{name}, micro batch {size}", "longhaul", {**stage, "micro_batch_size": size}, plain=True)
            for size in (2, 1)
        ),
    ]


EXPERTS = {"parallel": {"expert": 2}}
FULL = {"activation_checkpointing": "full"}
ROWS = [
    Row("dense/matrix products and attention alone", "limit", _stage(8)),
    Row("dense/FSDP2, compiled layers, chunked loss, micro batch 8", "fsdp2", _stage(8)),
    Row("dense/longhaul, ZeRO 1, micro batch 8", "longhaul", _stage(8)),
    Row("dense/longhaul, ZeRO 1, micro batch 4", "longhaul", _stage(4)),
    Row("dense/longhaul, ZeRO 1, micro batch 16", "longhaul", _stage(16)),
    Row("dense/longhaul, ZeRO 1, micro batch 8, compile: off", "longhaul", _stage(8, compile="off")),
    Row(
        "dense/longhaul, ZeRO 1, micro batch 16, selective",
        "longhaul",
        _stage(16, activation_checkpointing="selective"),
    ),
    Row("dense/longhaul, ZeRO 3, micro batch 8", "longhaul", _stage(8, zero={"stage": 3})),
    Row("dense/longhaul, ZeRO 1, micro batch 8, packed chats", "longhaul", _stage(8, kind="sft")),
    Row("dense/longhaul, ZeRO 1, micro batch 8, FP8", "longhaul", _stage(8, precision="fp8")),
    Row("dense/HF Trainer, ZeRO 2, Liger, micro batch 8", "hf_trainer", _stage(8)),
    Row("dense/deepspeed.initialize, ZeRO 1, micro batch 8", "plain_deepspeed", _stage(8)),
    Row("mixture/FSDP2, compiled layers, chunked loss, micro batch 8", "fsdp2", _stage(8)),
    Row("mixture/longhaul, ZeRO 1, micro batch 8", "longhaul", _stage(8)),
    Row("mixture/longhaul, ZeRO 1, micro batch 8, packed chats", "longhaul", _stage(8, kind="sft")),
    Row("mixture/longhaul, ZeRO 1, micro batch 8, FP8", "longhaul", _stage(8, precision="fp8")),
    *_plain_runs("losses", _losses()),
    Row("losses/longhaul, fp32", "longhaul", _losses(precision="fp32", compile="off")),
    Row("losses/longhaul", "longhaul", _losses()),
    Row("losses/longhaul, ZeRO 3", "longhaul", _losses(zero={"stage": 3})),
    Row("losses/longhaul, FP8", "longhaul", _losses(precision="fp8")),
    Row("curves/longhaul", "longhaul", _curves(), plain=True),
    Row("curves/longhaul, other attention kernel", "longhaul", _curves(), plain=True, kernels="flash"),
    Row("curves/longhaul, FP8", "longhaul", _curves(precision="fp8")),
    Row("dense on 2 GPUs/FSDP2, compiled layers, chunked loss, micro batch 8", "fsdp2", _two(_stage(8))),
    Row("dense on 2 GPUs/longhaul, ZeRO 1, micro batch 8", "longhaul", _two(_stage(8))),
    Row("dense on 2 GPUs/longhaul, ZeRO 3, micro batch 8", "longhaul", _two(_stage(8), zero={"stage": 3})),
    Row("8 B on 2 GPUs/FSDP2, compiled layers, chunked loss, full recompute", "fsdp2_sharded", _two(_stage(4), **FULL)),
    Row("8 B on 2 GPUs/longhaul, ZeRO 3, full recompute", "longhaul", _two(_stage(4), zero={"stage": 3}, **FULL)),
    Row("mixture on 2 GPUs/FSDP2, compiled layers, chunked loss, micro batch 8", "fsdp2", _two(_stage(8))),
    Row("mixture on 2 GPUs/longhaul, ZeRO 1, micro batch 8", "longhaul", _two(_stage(8))),
    Row("mixture on 2 GPUs/longhaul, experts over 2, micro batch 8", "longhaul", _two(_stage(8), **EXPERTS)),
    Row("mixture on 2 GPUs/longhaul, experts over 2, full recompute", "longhaul", _two(_stage(8), **EXPERTS, **FULL)),
    *_plain_runs("losses on 2 GPUs", _two(_losses())),
    Row("losses on 2 GPUs/longhaul", "longhaul", _two(_losses())),
    Row("losses on 2 GPUs/longhaul, ZeRO 3", "longhaul", _two(_losses(), zero={"stage": 3})),
    Row("losses on 2 GPUs/longhaul, ZeRO 3, full recompute", "longhaul", _two(_losses(), zero={"stage": 3}, **FULL)),
]
