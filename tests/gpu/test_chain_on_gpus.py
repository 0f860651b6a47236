"""The whole chain on this machine's GPUs: every ZeRO stage, precision and offload, NCCL, and exports that are proved.

A target of its own, `make test-gpu`, as it needs a GPU; `make test` does not collect it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chain import Chain, tiny_config, write_site
from longhaul.environment.facts import cuda_build
from machine import header, publish

GPUS = torch.cuda.device_count()
STEPS = 12
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32-zero0": {"precision": "fp32", "zero": {"stage": 0}},
    "fp32-zero1": {"precision": "fp32", "zero": {"stage": 1}},
    "fp32-recomputed": {"precision": "fp32", "zero": {"stage": 1}, "activation_checkpointing": "full"},
    "bf16-zero1": {"precision": "bf16", "zero": {"stage": 1}},
    "bf16-zero2": {"precision": "bf16", "zero": {"stage": 2}},
    "bf16-zero3": {"precision": "bf16", "zero": {"stage": 3}},
    "bf16-offloaded": {"precision": "bf16", "zero": {"stage": 2, "offload_optimizer": "cpu"}},
    "fp16-guide": {"precision": "fp16", "zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}},
}


def gpu_site() -> dict[str, Any]:
    """This machine, with floors that any GPU reaches."""
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {
        "name": "gpus",
        "scheduler": "local",
        "max_nodes": 1,
        "node": {"cpus": 16, "memory_mb": 64_000, "gpus": GPUS, "gpu_memory_gib": memory_gib, "gpu_peak_tflops": 989},
        "gpu_request": "none",
        "cuda_build": cuda_build(torch.version.cuda),
        "interconnect": {"kind": "none", "floors": {"all_reduce_gbps": 1.0} if GPUS > 1 else {}},
    }


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """One run with a stage for every variant, and a chat stage behind one of them."""
    config = tiny_config()
    base, chat = config["stages"]
    config["stages"] = [
        {**base, "name": name, "gpus_per_node": GPUS, "steps": STEPS, **variant} for name, variant in VARIANTS.items()
    ]
    start = {"stage": "bf16-zero3", "checkpoint": "best"}
    config["stages"].append({**chat, "gpus_per_node": GPUS, "precision": "bf16", "export_dtype": "bf16", "from": start})
    chain = Chain(tmp_path_factory.mktemp("gpus"), config)
    write_site(chain.folder, gpu_site())
    chain.run(timeout_s=540)
    return chain


@pytest.fixture(scope="module")
def record() -> Iterator[list[str]]:
    """Lines for bench/results/gpu.txt."""
    lines = [f"{GPUS} x {torch.cuda.get_device_name(0)}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"]
    yield lines
    publish("gpu", ["command: make test-gpu", *header(("torch", "deepspeed", "transformers"))[1:], *lines])


def rows(weights: Path, key: str) -> list[float]:
    lines = (weights / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def test_the_checks_saw_the_gpus(chain: Chain, record: list[str]):
    (node,) = chain.read("environment.json")["nodes"]
    assert len(node["gpus"]) == GPUS and node["versions"]["nccl"] and node["versions"]["driver"]
    fabric = chain.read("fabric.json")
    assert (fabric["backend"], fabric["world_size"]) == ("nccl", GPUS)
    for row in fabric["results"]:
        record.append(f"{row['collective']:>16} {row['bytes']:>12} bytes  bus {row['bus_bandwidth_gbps']:.2f} GB/s")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_follows_the_same_curve(chain: Chain, variant: str, record: list[str]):
    losses, reference = rows(chain.weights(variant), "loss"), rows(chain.weights("fp32-zero0"), "loss")
    bound = 1e-4 if variant.startswith("fp32") else 3e-2
    record.append(f"{variant:>16} losses {' '.join(f'{loss:.4f}' for loss in losses)}")
    assert losses == pytest.approx(reference, rel=bound)
    assert losses[-1] < losses[0] - 0.3
    assert (chain.weights(variant) / "legs.jsonl").read_text().count('"device": "cuda"') == 1


@pytest.mark.parametrize("stage", [*VARIANTS, "chat"])
def test_every_export_is_proved(chain: Chain, stage: str, record: list[str]):
    proof = chain.read(f"export/{stage}.json")["proof"]
    assert proof["tensors"]["equal"] == proof["tensors"]["count"] > 0
    assert proof["logits"]["max_abs_difference"] <= proof["logits"]["bound"]
    assert proof["from_pretrained"]["missing"] == proof["from_pretrained"]["unexpected"] == 0
    record.append(f"{stage:>16} {proof['tensors']['count']} tensors equal; logits {proof['logits']}")
