"""Stages that resume under another layout, over NCCL on two GPUs: the losses equal those of an uninterrupted stage.

tests/recovery/test_resharding.py shows over gloo that the loaded state is bit-identical. These tests add the fused optimizer
kernels, which read the loaded state on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.machine import describe_machine, write_result
from tests.gpu.runs_on_gpus import (
    GPUS,
    STEPS,
    describe_gpus,
    is_verified,
    metric,
    run_again,
    run_variants,
    trained_on_gpus,
    verification_line,
    verification_of,
)
from tests.parity.parity_cases import MODELS
from tests.support.pipeline_run import PipelineRun

pytestmark = [
    pytest.mark.skipif(GPUS != 2, reason=f"needs two GPUs, this machine has {GPUS}"),
    pytest.mark.timeout(900),
]

SAME = {"schedule": {"kind": "constant", "warmup_steps": 3}}
# Name -> stage keys of the first half of the steps, stage keys of the second half.
RESHARDINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero2-to-tensor": ({"zero": {"stage": 2}}, {"parallel": {"tensor": 2}}),
    "pipeline-to-zero3": ({"parallel": {"pipeline": 2}}, {"zero": {"stage": 3}}),
    "expert-to-zero2": ({"parallel": {"expert": 2}}, {"zero": {"stage": 2}}),
    "offloaded-to-tensor": ({"zero": {"stage": 2, "offload_optimizer": "cpu"}}, {"parallel": {"tensor": 2}}),
    "zero3-to-offloaded": ({"zero": {"stage": 3}}, {"zero": {"stage": 2, "offload_optimizer": "cpu"}}),
}
_HALF = {"steps": STEPS // 2, "export": "none"}
FIRST = {"uninterrupted": SAME, **{name: {**SAME, **keys, **_HALF} for name, (keys, _) in RESHARDINGS.items()}}
SECOND = {"uninterrupted": SAME, **{name: {**SAME, **keys} for name, (_, keys) in RESHARDINGS.items()}}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> PipelineRun:
    """Return a run that was run twice: the second time its stages have other layouts and twice the steps."""
    chain = run_variants(tmp_path_factory.mktemp("resharding"), FIRST, model=MODELS["deepseek_v3"])
    run_again(chain, SECOND)
    return chain


@pytest.fixture(scope="module")
def record() -> Iterator[list[str]]:
    """Collect lines for bench/results/gpu_resharding.txt."""
    lines = [describe_gpus()]
    yield lines
    write_result(
        "gpu_resharding",
        ["command: make test-gpu", *describe_machine(("torch", "deepspeed", "transformers"))[1:], *lines],
    )


@pytest.mark.parametrize("name", RESHARDINGS)
def test_a_resharded_stage_has_the_losses_of_an_uninterrupted_one(chain: PipelineRun, name: str, record: list[str]):
    losses, uninterrupted = metric(chain, name, "loss"), metric(chain, "uninterrupted", "loss")
    difference = max(abs(loss / reference - 1) for loss, reference in zip(losses, uninterrupted, strict=True))
    record.append(
        f"{name:>20} {difference:.1e} from the uninterrupted stage's losses: {' '.join(f'{loss:.4f}' for loss in losses)}"
    )
    assert difference <= 1e-4
    assert trained_on_gpus(chain, name, attempts=2)


@pytest.mark.parametrize("name", RESHARDINGS)
def test_its_export_is_verified(chain: PipelineRun, name: str, record: list[str]):
    verification = verification_of(chain, name)
    record.append(verification_line(name, verification))
    assert is_verified(verification), verification
