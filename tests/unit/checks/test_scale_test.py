"""The scale test measures the first steps of a stage on real ranks, keeps nothing of them, and compares them with limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.atomic_files import write_json
from longhaul.artifacts.paths import WeightsFolder
from longhaul.artifacts.scale_test_report import ScaleTestReport
from longhaul.checks.scale_test import scale_test_problems, scale_test_report
from longhaul.config.acceptance_limits import FEWEST_STEPS, communication_efficiency
from longhaul.config.scale_test_config import ScaleTest
from longhaul.jobs.kinds.scale_test_job import ScaleTestSpec
from longhaul.planning.scale_test_sizes import PROFILED_STEPS, STEPS, WARM_UP_STEPS
from longhaul.train import train_few_steps
from longhaul.train.train_few_steps import MeasuredSteps
from tests.parity.tokenizer_and_shards import write_shared_data
from tests.support.launch_ranks import run_worker
from tests.support.small_configs import base_stage

WORKER = Path(__file__).parents[2] / "support" / "scale_test_worker.py"
REPORT = ScaleTestReport([], "base", 4, 8, 20, 1.0, 0.04, 90.0, 0.9, 1, 0.8, 0.85, ["n1"], {}, 0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the reports on one and on two nodes, each of one rank over gloo; `refused` is what the second one printed."""
    folder = tmp_path_factory.mktemp("scale_test")
    shared = str(write_shared_data(folder / "shared"))
    run_worker(WORKER, 1, str(folder), shared)
    (folder / "refused").write_text(run_worker(WORKER, 2, str(folder), shared, "max_step_time_spread=1e-9"))
    run_worker(WORKER, 2, str(folder), shared)
    return folder


def test_real_ranks_are_measured_with_the_same_work_per_rank(folder: Path):
    one, two = (ScaleTestReport.read(folder / f"{nodes}.json") for nodes in (1, 2))
    assert (one.nodes, two.nodes, one.steps, two.steps) == (1, 2, FEWEST_STEPS, FEWEST_STEPS)
    assert one.efficiency is None and two.efficiency == pytest.approx(
        two.tokens_per_s_per_rank / one.tokens_per_s_per_rank
    )
    assert two.smallest_nodes == 1 and one.step_time_s > 0 and one.step_time_spread is not None
    assert one.gpu_utilisation is None and one.gpu_memory_share is None and one.problems == []


def test_what_the_steps_wrote_is_deleted(folder: Path):
    assert not (folder / "discarded").exists() and not (folder / "2.json.failed.json").exists()


def test_missed_limit_names_nodes_value_limit_and_key(folder: Path):
    refused = (folder / "refused").read_text()
    assert "the scale test of stage main on 2 nodes (" in refused
    assert "spread of the step times on 2 nodes: " in refused
    assert ", at most 0.0% (scale_test.max_step_time_spread)" in refused
    assert "set scale_test: off" in refused and "2.json.failed.json" in refused


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"step_time_spread": 0.051}, "spread of the step times on 4 nodes: 5.1%, at most 5.0% (max_step_time_spread)"),
        ({"gpu_memory_share": 0.91}, "memory of the fullest GPU on 4 nodes: 91.0%, at most 90.0% (max_gpu_memory)"),
        ({"gpu_utilisation": 0.7}, "GPU utilisation on 4 nodes: 70.0%, at least 75.0% (min_gpu_utilisation)"),
        (
            {"communication_efficiency": 0.84},
            "communication efficiency on 4 nodes: 84.0%, at least 85.0% (min_communication_efficiency)",
        ),
        ({"communication_efficiency": None}, None),
        ({"efficiency": 0.79}, "speed per rank on 4 nodes, by that on 1: 79.0%, at least 80.0% (min_efficiency)"),
        ({"step_time_spread": None, "gpu_memory_share": None, "gpu_utilisation": None, "efficiency": None}, None),
    ],
)
def test_each_limit_is_compared(change: dict[str, Any], problem: str | None):
    found = scale_test_problems(replace(REPORT, **change), ScaleTest())
    assert [text.replace("(scale_test.", "(") for text in found] == ([problem] if problem else [])


def test_warm_up_is_left_out_and_medians_are_taken(tmp_path: Path):
    """Warm-up and profiled steps would be the spread, and the speed is that of one rank of eight."""
    times = [100.0] * WARM_UP_STEPS + [2.0] * 19 + [2.04] + [50.0] * 4
    rows: list[Any] = [
        {"step": step, "loss": 5.0, "step_time_s": time, "tokens_per_s": 4000.0 / time, "gpu_utilisation": 90}
        for step, time in enumerate(times, 1)
    ]
    assert len(rows) == PROFILED_STEPS[1] and PROFILED_STEPS[0] - 1 > STEPS, "the profiler starts a step before"
    stage = base_stage(tmp_path)
    job = ScaleTestSpec.model_validate(
        {**dict(stage), "world_size": 8, "limits": ScaleTest(), "warm_up_steps": WARM_UP_STEPS, "smallest": None}
    )
    smallest = replace(REPORT, nodes=1, tokens_per_s_per_rank=500.0)
    report = scale_test_report(job, MeasuredSteps(rows, 0.5, ["n1", "n2"], True, 0.8), smallest)
    assert report.steps == FEWEST_STEPS and report.step_time_s == 2.0 and report.tokens_per_s_per_rank == 250.0
    assert report.efficiency == 0.5 and report.gpu_utilisation == 0.9 and report.gpu_memory_share == 0.5
    assert report.step_time_spread == pytest.approx(0.019, abs=1e-3)
    assert report.communication_efficiency == 0.8
    assert [problem.partition(":")[0] for problem in report.problems] == [
        "communication efficiency on 1 node",
        "speed per rank on 1 node, by that on 1",
    ]


def test_profile_of_this_rank_is_read(tmp_path: Path):
    assert train_few_steps._own_profile(tmp_path, 3) is None
    breakdown = {**breakdown_of(0.25), "gaps": [], "kernels": []}
    write_json(
        WeightsFolder(tmp_path).profile(3),
        {"rank": 3, "host": "n1", "first_step": 27, "steps": 3, "breakdown": breakdown},
    )
    assert train_few_steps._own_profile(tmp_path, 3) == breakdown


def breakdown_of(communication_s: float, has_kernels: bool = True) -> Any:
    """Return 2 s of profiled steps."""
    covered = {"communication": communication_s, "matrix products": 1.0}
    return {"has_kernels": has_kernels, "seconds": 2.0, "covered_s": covered, "idle_s": 0.5, "communication_s": 0.75}


def test_communication_efficiency_is_that_of_the_worst_rank_with_kernels():
    profiles = [breakdown_of(0.25), breakdown_of(0.5), breakdown_of(1.9, has_kernels=False)]
    assert communication_efficiency(profiles) == 0.75
    assert communication_efficiency(profiles[2:]) is None
