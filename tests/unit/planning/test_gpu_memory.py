"""The plan's memory beside what a GPU measured: `make bench-memory` wrote the peaks to bench/results/gpu_memory.txt."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu_memory import MODELS, OPTIONS, plan
from bench.memory_plan import MODEL, REFERENCE, make_175b_plan
from longhaul.config.model_size import geometry
from longhaul.config.run_config import Stage, Zero
from longhaul.planning.gpu_memory import estimate
from tests.support.chain import REPOSITORY

MEASURED = REPOSITORY / "bench/results/gpu_memory.txt"


def measured() -> dict[tuple[str, str], tuple[float, float]]:
    """(model, option) -> (peak in GiB, relative difference of the loss); a model's table begins with its name.

    A row is the option, GiB planned, measured and held, planned / measured, and what its losses differ by from the plain run's.
    """
    found, model = {}, ""
    for line in MEASURED.read_text().splitlines():
        first, *rest = line.split() or [""]
        model = first if first in MODELS else model
        if first in OPTIONS and rest[0].replace(".", "").isdigit():
            found[model, first] = float(rest[1]), float(rest[4])
    return found


@pytest.mark.parametrize(("model", "option"), [(m, o) for m in ("dense", "mixture") for o in OPTIONS])
def test_the_plan_is_within_a_tenth_of_the_measured_peak(model: str, option: str, tmp_path: Path):
    for name in ("corpus", "chats"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    memory = plan(tmp_path, model).stage(option).memory
    assert memory
    assert memory.total / 2**30 == pytest.approx(measured()[model, option][0], rel=0.1)


def test_every_option_trained_as_the_plain_run_did():
    assert set(measured()) == {(model, option) for model in ("dense", "mixture") for option in OPTIONS}
    assert max(differs for _, differs in measured().values()) < 1e-3  # in bf16


def test_keeping_fewer_activations_saves_a_third_and_more_at_175_billion_parameters():
    totals = {stage.name: stage.memory.total for stage in make_175b_plan().stages if stage.memory}
    assert list(totals) == ["none", "selective", "full", "offload"]
    assert sorted(totals.values(), reverse=True) == list(totals.values())
    assert totals["full"] < REFERENCE * totals["none"]


def test_a_second_copy_of_the_weights_inside_a_node_is_planned():
    stage, sizes = make_175b_plan().stages[0].stage, geometry({"model_type": "llama", **MODEL})
    plain, hierarchical = (estimate(_with_hierarchy(stage, ways), sizes, world_size=64).weights for ways in (1, 8))
    assert hierarchical - plain == 2 * sizes.total // 8


def _with_hierarchy(stage: Stage, ways: int) -> Stage:
    zero = Zero(stage=3, zero_hpz_partition_size=ways)
    return stage.model_copy(update={"zero": zero, "parallel": type(stage.parallel)()})
