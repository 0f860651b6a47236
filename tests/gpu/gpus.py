"""This machine's GPUs as a site, and a run with a stage for each of some variants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from longhaul.checks.node_facts import cuda_build
from tests.support.chain import Chain, tiny_config, write_site

GPUS = torch.cuda.device_count()
STEPS = 12
_STAGE_S = 90
"""A variant is trained, exported and proved in some 35 s on two H100s."""


def run_variants(folder: Path, variants: dict[str, dict[str, Any]], **changes: Any) -> Chain:
    """The finished chain; `changes` replace the top-level keys of the tiny config."""
    chain = Chain(folder, {**tiny_config(**changes), "stages": stages_of(variants)})
    write_site(chain.folder, _site())
    chain.run(timeout_s=_STAGE_S * len(variants))
    return chain


def go_on(chain: Chain, variants: dict[str, dict[str, Any]]) -> None:
    """Runs the chain again with its stages as these say."""
    chain.config["stages"] = stages_of(variants)
    chain.save()
    chain.run(timeout_s=_STAGE_S * len(variants))


def stages_of(variants: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A stage of the tiny config for each variant, over all GPUs."""
    stages = {stage["kind"]: stage for stage in tiny_config()["stages"]}
    return [
        {**stages[variant.get("kind", "pretrain")], "name": name, "gpus_per_node": GPUS, "steps": STEPS, **variant}
        for name, variant in variants.items()
    ]


def rows(chain: Chain, stage: str, key: str) -> list[float]:
    """A metric of every step that has it."""
    lines = (chain.weights(stage) / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def proof_of(chain: Chain, stage: str) -> dict[str, Any]:
    """How the stage's export was proved."""
    return chain.read(f"export/{stage}.json")["proof"]


def is_proved(proof: dict[str, Any]) -> bool:
    tensors, logits, loaded = proof["tensors"], proof["logits"], proof["from_pretrained"]
    return (
        tensors["equal"] == tensors["count"] > 0
        and logits["max_abs_difference"] <= logits["bound"]
        and loaded["missing"] == loaded["unexpected"] == 0
    )


def told(stage: str, proof: dict[str, Any]) -> str:
    """A line for a record."""
    return f"{stage:>20} {proof['tensors']['count']} tensors equal; logits {proof['logits']}"


def trained_on_gpus(chain: Chain, stage: str, legs: int = 1) -> bool:
    """In so many goes."""
    return (chain.weights(stage) / "attempts.jsonl").read_text().count('"device": "cuda"') == legs


def description() -> str:
    return f"{GPUS} x {torch.cuda.get_device_name(0)}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"


def _site() -> dict[str, Any]:
    """This machine, with limits that any GPU reaches."""
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {
        "name": "gpus",
        "scheduler": "local",
        "max_nodes": 1,
        "node": {"cpus": 16, "memory_mb": 64_000, "gpus": GPUS, "gpu_memory_gib": memory_gib, "gpu_peak_tflops": 989},
        "gpu_request": "none",
        "cuda_build": cuda_build(torch.version.cuda),
        "interconnect": {"kind": "none", "limits": {"all_reduce_gbps": 1.0} if GPUS > 1 else {}},
    }
