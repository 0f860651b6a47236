"""Prints the planned memory of a dense model of 175 B parameters under 3-D parallelism, for each activation checkpointing.

The sizes are those of GPT-3 (Brown et al. 2020, arXiv:2005.14165, table 2.1) with Llama's gated feed-forward layers, whose
width is two thirds of four times the hidden width. In every row, tensor ranks divide embedding and head, and the loss computes
the logits of 2,048 tokens at a time. `make bench-memory` compares plans with the measured memory of a GPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import yaml

from bench.machine import describe_machine, write_result
from longhaul.config.load_config import load_config
from longhaul.planning import Plan, build_plan

GPUS_PER_NODE, NODES = 8, 32
MODEL = {
    "vocab_size": 50_304,
    "hidden_size": 12_288,
    "intermediate_size": 32_768,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "num_key_value_heads": 96,
    "max_position_embeddings": 2048,
}
STAGE = {
    "kind": "pretrain",
    "dataset": "corpus",
    "steps": 1000,
    "global_batch_size": 512,
    "micro_batch_size": 1,
    "sequence_length": 2048,
    "precision": "bf16",
    "optimizer": {"lr": 1e-4},
    "schedule": {"kind": "constant", "warmup_steps": 100},
    "parallel": {"tensor": 8, "pipeline": 16},
    "zero": {"stage": 1},
    "nodes": NODES,
    "gpus_per_node": GPUS_PER_NODE,
    "minutes": 600,
}
CHECKPOINTING = ("none", "selective", "full", "offload")
TARGET = 280 / 420
"""Upper bound of the memory with full checkpointing, relative to none: from 420 to 280 GB at 175 B parameters."""


def main() -> None:
    """Print the GB of all GPUs of a node, and the ratio to the first row, for each kind of checkpointing."""
    planned = {stage.name: stage for stage in plan_175b().stages}
    total = {name: stage.memory.total * GPUS_PER_NODE / 1e9 for name, stage in planned.items() if stage.memory}
    lines = [f"{'activation_checkpointing':26} {'GB a node':>9} {'ratio':>6}"]
    lines += [f"{name:26} {size:9.0f} {size / total['none']:6.0%}" for name, size in total.items()]
    parts = [f"{name}: {stage.memory.as_gib()}" for name, stage in planned.items() if stage.memory]
    target = f"target: below {TARGET:.0%} (420 -> 280 GB)"
    write_result(
        "memory_plan",
        [*describe_machine(("pydantic",)), _layout_line(), *lines, target, "GiB of the fullest GPU:", *parts],
    )


def plan_175b() -> Plan:
    """Return a plan with one stage for each kind of checkpointing."""
    config = {
        "run": "dense-175b",
        "site": "slurm-generic",
        "tokenizer": {"train": {"vocab_size": 400, "datasets": ["corpus"]}},
        "datasets": {"corpus": {"kind": "text", "files": ["corpus.jsonl"]}},
        "model": {"llama": MODEL},
        "stages": [{"name": kind, **STAGE, "activation_checkpointing": kind} for kind in CHECKPOINTING],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus.jsonl").write_text('{"text": "a"}\n')
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        return build_plan(load_config(folder / "run.yaml"))


def _layout_line() -> str:
    return f"{NODES} nodes x {GPUS_PER_NODE} GPUs, tensor 8, pipeline 16, ZeRO 1, bf16, micro batch 1, sequence length 2048"


if __name__ == "__main__":
    main()
