"""The whole chain on this machine's GPUs: every ZeRO stage, precision and offload, and exports that are proved.

A target of its own, `make test-gpu`, as it needs a GPU; `make test` does not collect it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.machine import header, publish
from tests.gpu.gpus import GPUS, description, is_proved, proof_of, rows, run_variants, told, trained_on_gpus
from tests.support.chain import Chain

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
CHAT = {
    "kind": "sft",
    "precision": "bf16",
    "export_dtype": "bf16",
    "from": {"stage": "bf16-zero3", "checkpoint": "best"},
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """One run with a stage for every variant, and a chat stage behind one of them."""
    return run_variants(tmp_path_factory.mktemp("gpus"), {**VARIANTS, "chat": CHAT})


@pytest.fixture(scope="module")
def record() -> Iterator[list[str]]:
    """Lines for bench/results/gpu.txt."""
    lines = [description()]
    yield lines
    publish("gpu", ["command: make test-gpu", *header(("torch", "deepspeed", "transformers"))[1:], *lines])


def test_the_checks_saw_the_gpus(chain: Chain, record: list[str]):
    (node,) = chain.read("environment.json")["nodes"]
    assert len(node["gpus"]) == GPUS and node["versions"]["nccl"] and node["versions"]["driver"]
    fabric = chain.read("fabric.json")
    assert (fabric["backend"], fabric["world_size"]) == ("nccl", GPUS)
    for row in fabric["results"]:
        record.append(f"{row['collective']:>16} {row['bytes']:>12} bytes  bus {row['bus_bandwidth_gbps']:.2f} GB/s")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_follows_the_same_curve(chain: Chain, variant: str, record: list[str]):
    losses = rows(chain, variant, "loss")
    record.append(f"{variant:>16} losses {' '.join(f'{loss:.4f}' for loss in losses)}")
    bound = 1e-4 if variant.startswith("fp32") else 3e-2
    assert losses == pytest.approx(rows(chain, "fp32-zero0", "loss"), rel=bound)
    assert losses[-1] < losses[0] - 0.3
    assert trained_on_gpus(chain, variant)


@pytest.mark.parametrize("stage", [*VARIANTS, "chat"])
def test_every_export_is_proved(chain: Chain, stage: str, record: list[str]):
    proof = proof_of(chain, stage)
    record.append(told(stage, proof))
    assert is_proved(proof), proof
