"""The rate of matrix products is that of the operations and the time of one product; wrong products are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longhaul.artifacts.paths import JobId
from longhaul.checks import matrix_products
from longhaul.checks.matrix_products import ExactProduct
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
    assert isinstance(spec, EnvironmentSpec) and spec.measures_speed
    stage = plan.paths.stage("base")
    assert not environment_spec(plan, stage, "gpu", 1, 1, str(stage.node_check_report)).measures_speed


def test_product_is_exact_in_bf16_and_its_sums_are_those_of_integers() -> None:
    exact = ExactProduct(512)
    product_NN = exact.a_NN.long() @ exact.b_NN.long()
    assert product_NN.abs().max() < 256 and torch.equal(product_NN.bfloat16().long(), product_NN)
    assert torch.equal((product_NN @ exact.weights_N.long()).double(), exact.sums_N)
    share = exact.a_NN.count_nonzero() / exact.a_NN.numel()
    assert 0.24 < share < 0.26 and set(exact.a_NN.unique().tolist()) == {-1, 0, 1}
    assert exact.count_wrong_rows(torch.mm(*exact.factors(torch.device("cpu")))) == 0


def test_all_ranks_multiply_the_same_matrices() -> None:
    assert torch.equal(ExactProduct(64).a_NN, ExactProduct(64).a_NN)


@pytest.mark.parametrize("wrong", [1.0, float("nan"), float("inf")])
def test_one_wrong_element_is_one_wrong_row(wrong: float) -> None:
    exact = ExactProduct(128)
    product_NN = (exact.a_NN.float() @ exact.b_NN.float()).bfloat16()
    assert exact.count_wrong_rows(product_NN) == 0
    product_NN[17, 3] += wrong
    assert exact.count_wrong_rows(product_NN) == 1


def test_an_error_in_any_column_is_found() -> None:
    exact = ExactProduct(128)
    product_NN = (exact.a_NN.float() @ exact.b_NN.float()).bfloat16()
    for column in range(128):
        wrong_NN = product_NN.clone()
        wrong_NN[:, column] += 1
        assert exact.count_wrong_rows(wrong_NN) == 128, column
