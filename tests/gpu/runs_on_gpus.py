"""A site file for this machine's GPUs, and runs that have one stage for each variant of a stage config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.pipeline_run import PipelineRun, tiny_config, write_site

GPUS = torch.cuda.device_count()
STEPS = 12
_START_TIMEOUT_S = 180
"""The checks of the environment and the fabric take about 45 s on two H200s."""
_STAGE_TIMEOUT_S = 150
"""Training, export and verification of a variant take up to 80 s on two H200s if nothing is compiled yet, else about 35 s."""


def run_variants(folder: Path, variants: dict[str, dict[str, Any]], **changes: Any) -> PipelineRun:
    """Run all stages and return the finished chain; `changes` replace top-level keys of the tiny config."""
    chain = PipelineRun(folder, {**tiny_config(**changes), "stages": stages_of(variants)})
    write_site(chain.folder, this_site())
    chain.run(timeout_s=_START_TIMEOUT_S + _STAGE_TIMEOUT_S * len(variants))
    return chain


def run_again(chain: PipelineRun, variants: dict[str, dict[str, Any]]) -> None:
    """Run the chain again with other stage configs of the same names."""
    chain.config["stages"] = stages_of(variants)
    chain.save()
    chain.run(timeout_s=_START_TIMEOUT_S + _STAGE_TIMEOUT_S * len(variants))


def stages_of(variants: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a stage of the tiny config for each variant, over all GPUs; steps take the place of epochs."""
    stages = {
        stage["kind"]: {key: value for key, value in stage.items() if key != "epochs"}
        for stage in tiny_config()["stages"]
    }
    return [
        {**stages[variant.get("kind", "pretrain")], "name": name, "gpus_per_node": GPUS, "steps": STEPS, **variant}
        for name, variant in variants.items()
    ]


def metric(chain: PipelineRun, stage: str, key: str) -> list[float]:
    """Return a metric of every step that has it."""
    lines = (chain.weights(stage) / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def verification_of(chain: PipelineRun, stage: str) -> dict[str, Any]:
    """Return the verification of the stage's export."""
    return chain.read(f"export/{stage}.json")["verification"]


def is_verified(verification: dict[str, Any]) -> bool:
    """Return True if all tensors are equal, the logits are within the bound, and from_pretrained loads every weight."""
    tensors, logits, loaded = (verification[key] for key in ("tensors", "logits", "from_pretrained"))
    return (
        tensors["equal"] == tensors["count"] > 0
        and logits["max_abs_difference"] <= logits["bound"]
        and loaded["missing"] == loaded["unexpected"] == 0
    )


def verification_line(stage: str, verification: dict[str, Any]) -> str:
    """Return a line for a record."""
    return f"{stage:>20} {verification['tensors']['count']} tensors equal; logits {verification['logits']}"


def trained_on_gpus(chain: PipelineRun, stage: str, attempts: int = 1) -> bool:
    """Return True if the stage had this number of attempts on GPUs."""
    return (chain.weights(stage) / "attempts.jsonl").read_text().count('"device": "cuda"') == attempts


def describe_gpus() -> str:
    """Return number and name of the GPUs and the version of NCCL."""
    return f"{GPUS} x {torch.cuda.get_device_name(0)}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"


def this_site() -> dict[str, Any]:
    """Return a site file of this machine, with fabric limits that any GPU reaches."""
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    node = {"cpus": 16, "memory_mb": 64_000, "gpus": GPUS, "gpu_memory_gib": memory_gib, "gpu_peak_tflops": 989}
    return {
        "name": "gpus",
        "scheduler": "local",
        "partitions": [{"jobs": ["gpu"], "node": node}],
        "accelerator": {"cuda": torch.version.cuda},
        "interconnect": {
            "kind": "none",
            "nvlink_multicast": "off",
            "limits": {"all_reduce_gbps": 1.0} if GPUS > 1 else {},
        },
    }
