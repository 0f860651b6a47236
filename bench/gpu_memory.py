"""Planned beside measured peak memory of one GPU, and losses beside the plain run's, for every way to save memory.

    make bench-memory          a dense model and a mixture of experts of about 1 B parameters, on one GPU

Each option is a stage of one run through the whole chain; all of them begin with the same weights and see the same samples.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from test_chain_on_gpus import gpu_site

from chain import Chain, tiny_config, write_site
from machine import header, publish

STEPS, SEQUENCE_LENGTH, MICRO_BATCH, GLOBAL_BATCH = 8, 2048, 4, 8
DENSE = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    }
}
MIXTURE = {
    "qwen3_moe": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "moe_intermediate_size": 768,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
    }
}
MODELS = {"dense": DENSE, "mixture": MIXTURE}
PLAIN = "zero1"
OPTIONS: dict[str, dict[str, Any]] = {
    PLAIN: {"zero": {"stage": 1}},
    "zero2": {"zero": {"stage": 2}},
    "zero3": {"zero": {"stage": 3}},
    "zero2-optimizer-offloaded": {"zero": {"stage": 2, "offload_optimizer": "cpu"}},
    "zero3-all-offloaded": {"zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}},
    "selective": {"zero": {"stage": 1}, "activation_checkpointing": "selective"},
    "full": {"zero": {"stage": 1}, "activation_checkpointing": "full"},
    "offload": {"zero": {"stage": 1}, "activation_checkpointing": "offload"},
}


def main() -> None:
    """Trains every option of the models that are named, or of both, and prints a line for each."""
    lines = [
        f"{torch.cuda.get_device_name(0)}; {STEPS} steps, sequence length {SEQUENCE_LENGTH}, micro batch {MICRO_BATCH}, bf16"
    ]
    for name in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            lines += compare(name, trained(Path(folder), MODELS[name]))
    publish("gpu_memory", [*header(("torch", "deepspeed", "transformers")), *lines])


def trained(folder: Path, model: dict[str, Any]) -> Chain:
    """A run with a stage for every option."""
    config = tiny_config(model=model)
    stage = {
        "kind": "pretrain",
        "dataset": "prose",
        "steps": STEPS,
        "global_batch": GLOBAL_BATCH,
        "micro_batch": MICRO_BATCH,
        "sequence_length": SEQUENCE_LENGTH,
        "precision": "bf16",
        "optimizer": {"lr": 1e-4},
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "checkpoints": {"every_steps": STEPS, "keep_best": 0},
        "validation": {"every_steps": STEPS, "max_samples": 2},
        "minutes": 10,
    }
    config["stages"] = [{"name": name, **stage, **option} for name, option in OPTIONS.items()]
    chain = Chain(folder, config)
    words = "the long haul takes raw text to a model and proves every step of the way home again".split()  # noqa: SIM905
    texts = [" ".join(words[(i * k) % len(words)] for k in range(1, 400)) for i in range(1, 600)]
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_site(folder, gpu_site())
    chain.run(
        "--",
        *(f"results/tiny/stages/{name}/checkpoint.json" for name in OPTIONS),
        "results/tiny/plan.json",
        timeout_s=590,
    )
    return chain


def compare(model: str, chain: Chain) -> list[str]:
    """Planned and measured GiB, and the largest relative difference of a loss from the plain run's."""
    planned = {row["name"]: row["memory_per_gpu_gib"] for row in chain.read("plan.json")["stages"]}
    plain = values(chain, PLAIN, "loss")
    title = f"{model:28} {'planned GiB':>11} {'measured':>9} {'planned / measured':>19} {'tokens/s':>9} {'loss differs by':>16}"
    lines = ["", title]
    for name in OPTIONS:
        measured = max(values(chain, name, "memory_bytes")) / 2**30
        losses = values(chain, name, "loss")
        differs = max(abs(a - b) / abs(b) for a, b in zip(losses, plain, strict=True))
        rate = sorted(values(chain, name, "tokens_per_s"))[STEPS // 2]
        total = planned[name]["total"]
        lines.append(f"{name:28} {total:11.2f} {measured:9.2f} {total / measured:19.3f} {rate:9,.0f} {differs:16.1e}")
    lines += [f"{name:28} {json.dumps(planned[name])}" for name in OPTIONS]
    return lines


def values(chain: Chain, stage: str, key: str) -> list[float]:
    """Of every optimizer step."""
    rows = [json.loads(line) for line in (chain.weights(stage) / "metrics.jsonl").open()]
    return [row[key] for row in rows if "loss" in row]


if __name__ == "__main__":
    main()
