"""Stages that go on in another layout, over NCCL on two GPUs: the loss goes on on the curve of an undisturbed run.

That nothing of the state changes is proved bit for bit over gloo (tests/survival/test_elastic.py); here it is the optimizer's
fused kernels, which read that state where it lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.machine import header, publish
from tests.gpu.gpus import (
    GPUS,
    STEPS,
    description,
    go_on,
    is_proved,
    proof_of,
    rows,
    run_variants,
    told,
    trained_on_gpus,
)
from tests.parity.parity_cases import MODELS
from tests.support.chain import Chain

pytestmark = [
    pytest.mark.skipif(GPUS != 2, reason=f"needs two GPUs, this machine has {GPUS}"),
    pytest.mark.timeout(900),
]

SAME = {"schedule": {"kind": "constant", "warmup_steps": 3}}
# Name -> before, and after half of the steps.
MOVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero2-to-tensor": ({"zero": {"stage": 2}}, {"parallel": {"tensor": 2}}),
    "pipeline-to-zero3": ({"parallel": {"pipeline": 2}}, {"zero": {"stage": 3}}),
    "expert-to-zero2": ({"parallel": {"expert": 2}}, {"zero": {"stage": 2}}),
    "offloaded-to-tensor": ({"zero": {"stage": 2, "offload_optimizer": "cpu"}}, {"parallel": {"tensor": 2}}),
    "zero3-to-offloaded": ({"zero": {"stage": 3}}, {"zero": {"stage": 2, "offload_optimizer": "cpu"}}),
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """One run that is given again, with its stages in other layouts and twice as long."""
    first = {name: {**SAME, **before, "steps": STEPS // 2, "export": "none"} for name, (before, _) in MOVES.items()}
    second = {name: {**SAME, **after} for name, (_, after) in MOVES.items()}
    chain = run_variants(tmp_path_factory.mktemp("moves"), {"whole": SAME, **first}, model=MODELS["deepseek_v3"])
    go_on(chain, {"whole": SAME, **second})
    return chain


@pytest.fixture(scope="module")
def record() -> Iterator[list[str]]:
    """Lines for bench/results/gpu_moves.txt."""
    lines = [description()]
    yield lines
    publish("gpu_moves", ["command: make test-gpu", *header(("torch", "deepspeed", "transformers"))[1:], *lines])


@pytest.mark.parametrize("move", MOVES)
def test_a_stage_goes_on_in_another_layout(chain: Chain, move: str, record: list[str]):
    losses, whole = rows(chain, move, "loss"), rows(chain, "whole", "loss")
    furthest = max(abs(loss / reference - 1) for loss, reference in zip(losses, whole, strict=True))
    record.append(
        f"{move:>20} {furthest:.1e} from the whole run's losses: {' '.join(f'{loss:.4f}' for loss in losses)}"
    )
    assert furthest <= 1e-4
    assert trained_on_gpus(chain, move, legs=2)


@pytest.mark.parametrize("move", MOVES)
def test_its_export_is_proved(chain: Chain, move: str, record: list[str]):
    proof = proof_of(chain, move)
    record.append(told(move, proof))
    assert is_proved(proof), proof
