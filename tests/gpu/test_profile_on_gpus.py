"""A profile of steps on a GPU has its kernels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from longhaul.artifacts.line_record_fields import StepProfile
from longhaul.artifacts.paths import WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.train.monitoring.kernel_classes import ELEMENTWISE, MATRIX
from longhaul.train.monitoring.profile_steps import StepProfiler


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_of_the_asked_steps_are_recorded(tmp_path: Path):
    """Step s multiplies matrices s times. The steps before must not be in the profile, although the CPU runs ahead of the GPU."""
    job = SimpleNamespace(stage=SimpleNamespace(profile_steps=(4, 5)))
    context = SimpleNamespace(
        rank=SimpleNamespace(rank=0, world_size=1, host="n1"), device=torch.device("cuda", torch.cuda.current_device())
    )
    profiler = StepProfiler(cast(Any, job), cast(Any, context), tmp_path)
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for step in range(1, 8):
        profiler.begin_step(step)
        for _ in range(step):
            torch.mm(matrix, matrix).sin_()
        profiler.end_step()
    found = read_typed_json(WeightsFolder(tmp_path).profile(0), StepProfile)
    breakdown = found["breakdown"]
    calls = {
        kind: sum(kernel["calls"] for kernel in breakdown["kernels"] if kernel["kind"] == kind)
        for kind in (MATRIX, ELEMENTWISE)
    }
    assert breakdown["has_kernels"] and calls[ELEMENTWISE] == 4 + 5
    assert calls[MATRIX] in (4 + 5, 2 * (4 + 5))  # cuBLAS may split a product and add its parts in a second kernel
    assert breakdown["covered_s"][MATRIX] > breakdown["covered_s"][ELEMENTWISE] > 0
