"""The rate of matrix products is that of the operations and the time of one product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longhaul.artifacts.paths import JobId
from longhaul.checks import matrix_products
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.environment_job import EnvironmentSpec, environment_spec
from tests.support.small_configs import plan_of


def test_rate_is_operations_by_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first products, which also load the library, do not count."""
    times_s = iter([9.0] * 5 + [0.5] * 9 + [0.25] * 2 + [1.0] * 9)
    monkeypatch.setattr(matrix_products, "_product_s", lambda *_: next(times_s))
    assert matrix_products.matrix_tflops(torch.device("cpu"), 64) == 2 * 64**3 / 0.5 / 1e12


def test_product_is_timed_on_this_machine() -> None:
    assert 0 < matrix_products.matrix_tflops(torch.device("cpu"), 128) < 1000


def test_only_the_environment_job_measures(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    spec = job_spec(plan, JobId("environment"))
    assert isinstance(spec, EnvironmentSpec) and spec.measures_gpus
    assert not environment_spec(plan, "gpu", 1, 1, str(plan.paths.stage("base").node_check_report)).measures_gpus
