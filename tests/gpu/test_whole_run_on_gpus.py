"""The whole chain on this machine's GPUs: every ZeRO stage, precision and offload, with verified exports.

These tests need a GPU, so `make test-gpu` runs them and `make test` does not collect them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.machine import describe_machine, write_result
from tests.gpu.runs_on_gpus import (
    GPUS,
    describe_gpus,
    is_verified,
    metric,
    run_variants,
    trained_on_gpus,
    verification_line,
    verification_of,
)
from tests.support.pipeline_run import PipelineRun

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32-zero0": {"precision": "fp32", "zero": {"stage": 0}},
    "fp32-zero1": {"precision": "fp32", "zero": {"stage": 1}},
    "fp32-recomputed": {"precision": "fp32", "zero": {"stage": 1}, "activation_checkpointing": "full"},
    "bf16-zero1": {"precision": "bf16", "zero": {"stage": 1}},
    "bf16-zero2": {"precision": "bf16", "zero": {"stage": 2}},
    "bf16-zero3": {"precision": "bf16", "zero": {"stage": 3}},
    "bf16-offloaded": {"precision": "bf16", "zero": {"stage": 2, "offload_optimizer": "cpu"}},
    "fp16-offloaded": {"precision": "fp16", "zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}},
}
CHAT = {
    "kind": "sft",
    "precision": "bf16",
    "export_dtype": "bf16",
    "from": {"stage": "bf16-zero3", "checkpoint": "best"},
}
RUN = {**VARIANTS, "chat": CHAT}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> PipelineRun:
    """Return one run with a stage for every variant, and a chat stage that starts from one of them."""
    return run_variants(tmp_path_factory.mktemp("gpus"), RUN)


@pytest.fixture(scope="module")
def record() -> Iterator[list[str]]:
    """Collect lines for bench/results/gpu.txt."""
    lines = [describe_gpus()]
    yield lines
    write_result(
        "gpu", ["command: make test-gpu", *describe_machine(("torch", "deepspeed", "transformers"))[1:], *lines]
    )


def test_environment_and_fabric_check_find_the_gpus(chain: PipelineRun, record: list[str]):
    (node,) = chain.read("environment.json")["nodes"]
    assert len(node["gpus"]) == GPUS and node["versions"]["nccl"] and node["versions"]["driver"]
    fabric = chain.read("fabric.json")
    assert (fabric["backend"], fabric["world_size"]) == ("nccl", GPUS)
    for row in fabric["results"]:
        record.append(f"{row['collective']:>16} {row['bytes']:>12} bytes  bus {row['bus_bandwidth_gbps']:.2f} GB/s")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_same_losses(chain: PipelineRun, variant: str, record: list[str]):
    losses = metric(chain, variant, "loss")
    record.append(f"{variant:>16} losses {' '.join(f'{loss:.4f}' for loss in losses)}")
    bound = 1e-4 if variant.startswith("fp32") else 3e-2
    assert losses == pytest.approx(metric(chain, "fp32-zero0", "loss"), rel=bound)
    assert losses[-1] < losses[0] - 0.3
    assert trained_on_gpus(chain, variant)


@pytest.mark.parametrize("stage", [*VARIANTS, "chat"])
def test_every_export_is_verified(chain: PipelineRun, stage: str, record: list[str]):
    verification = verification_of(chain, stage)
    record.append(verification_line(stage, verification))
    assert is_verified(verification), verification
