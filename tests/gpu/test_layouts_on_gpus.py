"""Every parallel axis over NCCL on two GPUs: a small DeepSeek-V3, compared with the same stage under data parallelism.

`make parity` checks the arithmetic over gloo. These tests add NCCL, CUDA streams and GPU kernels.
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
from tests.parity.parity_cases import MODELS
from tests.support.pipeline_run import PipelineRun

pytestmark = [
    pytest.mark.skipif(GPUS != 2, reason=f"needs two GPUs, this machine has {GPUS}"),
    pytest.mark.timeout(3600),
]

BASELINE = "data"
AXES: dict[str, dict[str, Any]] = {
    axis: {"parallel": {axis: 2}} for axis in ("tensor", "pipeline", "expert", "sequence")
}
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "axes": {**AXES, "selective": {"activation_checkpointing": "selective"}},
    "combined": {
        **{f"zero3-{axis}": {**AXES[axis], "zero": {"stage": 3}} for axis in ("tensor", "expert")},
        "pipeline-offloaded": {**AXES["pipeline"], "zero": {"stage": 1, "offload_optimizer": "cpu"}},
        "expert-recomputed": {**AXES["expert"], "activation_checkpointing": "full"},
        "inputs-offloaded": {"activation_checkpointing": "offload"},
    },
    "rounded": {f"bf16-{axis}": {**AXES[axis], "precision": "bf16"} for axis in AXES},
    "communication": {
        "reduced-in-bf16": {"communication": {"data_type": "bf16"}},
        "powersgd": {"communication": {"powersgd": {"rank": 8, "start_step": 2}}},
    },
}
"""Group -> variants that one command compares: `-k axes` runs those of axes and the baseline."""
BOUNDS = {"axes": 1e-4, "combined": 1e-4, "rounded": 3e-2, "communication": 3e-2}
"""Largest relative difference of a loss from the baseline's."""
VARIANTS = {BASELINE: {}, **{name: keys for group in GROUPS.values() for name, keys in group.items()}}
every_variant = pytest.mark.parametrize(
    ("group", "variant"),
    [
        pytest.param(group, name, id=f"{group}:{name}")
        for group, variants in GROUPS.items()
        for name in (BASELINE, *variants)
    ],
)


@pytest.fixture(scope="module")
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PipelineRun:
    """Return one run with a stage for every variant that `-k` selects, and for the baseline."""
    asked = {item.callspec.params["variant"] for item in request.session.items if hasattr(item, "callspec")}
    chosen = {name: keys for name, keys in VARIANTS.items() if name in {BASELINE, *asked}}
    return run_variants(tmp_path_factory.mktemp("layouts"), chosen, model=MODELS["deepseek_v3"])


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[dict[str, list[str]]]:
    """Collect lines for the record of each group, bench/results/gpu_layouts_<group>.txt."""
    lines: dict[str, list[str]] = {group: [] for group in GROUPS}
    yield lines
    selected = request.config.option.keyword
    command = f"pytest tests/gpu/test_layouts_on_gpus.py -k '{selected}'" if selected else "make test-gpu"
    machine = describe_machine(("torch", "deepspeed", "transformers"))[1:]
    for group, of_group in lines.items():
        if of_group:
            write_result(f"gpu_layouts_{group}", [f"command: {command}", *machine, describe_gpus(), *of_group])


@every_variant
def test_every_layout_has_the_same_losses(chain: PipelineRun, group: str, variant: str, record: dict[str, list[str]]):
    losses, baseline = metric(chain, variant, "loss"), metric(chain, BASELINE, "loss")
    difference = max(abs(loss / reference - 1) for loss, reference in zip(losses, baseline, strict=True))
    record[group].append(
        f"{variant:>20} {difference:.1e} from {BASELINE}'s losses: {' '.join(f'{loss:.4f}' for loss in losses)}"
    )
    assert difference <= BOUNDS[group]
    assert losses[-1] < losses[0] - 0.3
    assert trained_on_gpus(chain, variant)


@every_variant
def test_every_export_is_verified(chain: PipelineRun, group: str, variant: str, record: dict[str, list[str]]):
    verification = verification_of(chain, variant)
    record[group].append(verification_line(variant, verification))
    assert is_verified(verification), verification
