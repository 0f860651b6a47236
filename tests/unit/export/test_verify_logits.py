"""The criterion for the logits of an export follows from what differs between the trainer and the export job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from longhaul.errors import UserError
from longhaul.export import verify_logits as module
from longhaul.export.verify_logits import (
    Criterion,
    Difference,
    ReferenceLogits,
    choose_criterion,
    find_differences,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SUMS, GPU = Difference.SUMS_OVER_RANKS, Difference.GPU_KERNELS


def reference(**changes: Any) -> ReferenceLogits:
    """Return reference logits of this machine."""
    here = ReferenceLogits(
        input_ids_PT=torch.zeros(2, 3, dtype=torch.int64),
        logits_PTV=torch.tensor([[[1.0, -4.0]]]),
        device="cpu",
        threads=1,
        compute=FP32,
        torch_version=torch.__version__,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        sums_over_ranks=False,
    )
    return replace(here, **changes)


DIFFERENCES: list[tuple[dict[str, Any], str, torch.dtype, bool, set[Difference]]] = [
    ({}, "cpu", FP32, True, set()),
    ({}, "cpu", FP32, False, set()),
    ({}, "cpu", BF16, True, {Difference.EXPORT_DTYPE}),
    ({"compute": BF16}, "cpu", BF16, True, set()),
    ({"compute": BF16}, "cpu", FP32, True, set()),
    ({"compute": BF16}, "cpu", FP32, False, {Difference.COMPUTE_DTYPE}),
    ({"compute": FP16}, "cpu", BF16, False, {Difference.EXPORT_DTYPE}),
    ({"sums_over_ranks": True}, "cpu", FP32, False, {SUMS}),
    ({"sums_over_ranks": True, "compute": BF16}, "cpu", BF16, False, {SUMS}),
    ({"torch_version": "1.0"}, "cpu", FP32, True, {Difference.TORCH}),
    ({"cpu_capability": "AVX9"}, "cpu", FP32, True, {Difference.CPU_CAPABILITY}),
    ({"cpu_capability": None}, "cpu", FP32, True, set()),
    ({"device": "cuda", "cpu_capability": "AVX9"}, "cuda", FP32, True, {GPU}),
    ({"device": "cuda"}, "cpu", FP32, True, {Difference.DEVICE}),
    ({"device": "cuda", "sums_over_ranks": True}, "cpu", FP32, True, {Difference.DEVICE, SUMS}),
]


@pytest.mark.parametrize(("changes", "device", "dtype", "bit_equal", "expected"), DIFFERENCES)
def test_differences_are_found(
    changes: dict[str, Any], device: str, dtype: torch.dtype, bit_equal: bool, expected: set[Difference]
) -> None:
    assert set(find_differences(reference(**changes), device, dtype, bit_equal)) == expected


def test_descriptions_name_both_sides() -> None:
    found = find_differences(reference(torch_version="1.0", device="cuda"), "cpu", FP32, False)
    assert found[Difference.TORCH] == f"trained with torch 1.0, verified with {torch.__version__}"
    assert found[Difference.DEVICE] == "trained with device cuda, verified with cpu"
    assert find_differences(reference(), "cpu", BF16, False) == {
        Difference.EXPORT_DTYPE: "exported as bf16, computed in fp32"
    }


CRITERIA: list[tuple[set[Difference], torch.dtype, torch.dtype, bool, Criterion]] = [
    (set(), FP32, FP32, False, Criterion.BIT_EQUALITY),
    (set(), BF16, BF16, True, Criterion.BIT_EQUALITY),
    ({SUMS}, FP32, FP32, False, Criterion.RELATIVE_BOUND),
    ({GPU}, FP32, FP32, False, Criterion.RELATIVE_BOUND),
    ({GPU}, FP32, FP32, True, Criterion.PERTURBATION_BOUND),
    ({SUMS}, FP32, FP32, True, Criterion.RELATIVE_BOUND),
    ({SUMS}, BF16, FP32, False, Criterion.PERTURBATION_BOUND),
    ({SUMS, Difference.TORCH}, FP32, FP32, False, Criterion.PERTURBATION_BOUND),
    ({Difference.EXPORT_DTYPE}, FP32, BF16, False, Criterion.PERTURBATION_BOUND),
    ({Difference.COMPUTE_DTYPE}, BF16, FP32, False, Criterion.PERTURBATION_BOUND),
]


@pytest.mark.parametrize(("differences", "compute", "dtype", "allow_tf32", "expected"), CRITERIA)
def test_criterion_is_the_strictest_that_the_differences_allow(
    differences: set[Difference], compute: torch.dtype, dtype: torch.dtype, allow_tf32: bool, expected: Criterion
) -> None:
    assert choose_criterion(dict.fromkeys(differences, ""), compute, dtype, allow_tf32) is expected


def test_coarsest_type_sets_the_size_of_perturbations() -> None:
    assert module._coarsest_eps(reference(), "cpu", FP32) == 2.0**-23
    assert module._coarsest_eps(reference(compute=FP16), "cpu", FP32) == 2.0**-10
    assert module._coarsest_eps(reference(), "cpu", BF16) == 2.0**-7
    assert module._coarsest_eps(reference(device="cuda"), "cpu", FP32) == 2.0**-10
    assert module._coarsest_eps(reference(), "cuda", FP32) == 2.0**-10


def result(**changes: Any) -> dict[str, Any]:
    return {"bit_equal": False, "max_abs_difference": 0.5, "bound": 0.5, "differences": ["another torch"], **changes}


@pytest.mark.parametrize(
    ("changes", "criterion"),
    [
        ({}, Criterion.PERTURBATION_BOUND),
        ({"masters_bit_equal": True}, Criterion.PERTURBATION_BOUND),
        ({"bit_equal": True, "bound": 0.0, "max_abs_difference": 0.0}, Criterion.BIT_EQUALITY),
    ],
)
def test_results_within_their_criterion_are_accepted(changes: dict[str, Any], criterion: Criterion) -> None:
    accepted = result(**changes)
    module._require(accepted, criterion)  # raises for a result outside of it, as the next test shows
    assert accepted == result(**changes), "the recorded result is not changed"


@pytest.mark.parametrize(
    ("changes", "criterion", "message"),
    [
        ({"bound": 0.4}, Criterion.RELATIVE_BOUND, r"up to 0.5; the limit is 0.4, .* relative bound \(another torch\)"),
        ({"bound": 1.0}, Criterion.BIT_EQUALITY, "the criterion is bit equality"),
        ({"max_abs_difference": float("nan")}, Criterion.PERTURBATION_BOUND, "up to nan"),
        ({"masters_bit_equal": False}, Criterion.PERTURBATION_BOUND, "with the master weights does not give"),
    ],
)
def test_results_outside_their_criterion_are_refused(
    changes: dict[str, Any], criterion: Criterion, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        module._require(result(**changes), criterion)


def test_relative_bound_is_a_share_of_the_largest_logit() -> None:
    unused: Any = None
    bounds = module._bounds(Criterion.RELATIVE_BOUND, {}, unused, reference(), "cpu", FP32)
    assert bounds == {"bound": pytest.approx(4e-5)}
    assert module._bounds(Criterion.BIT_EQUALITY, {}, unused, reference(), "cpu", FP32) == {}


def test_perturbation_bound_is_twice_the_largest_change() -> None:
    changes = iter([0.5, -3.0, 2.0])
    bound = module._perturbation_bound(lambda read: torch.tensor([1.0, 1.0 + next(changes)]), torch.ones(2), eps=0.1)
    assert bound == 6.0
