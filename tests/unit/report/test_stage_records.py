"""The measured speed of a stage replaces the estimate of its plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.atomic_files import write_json
from longhaul.artifacts.paths import WeightsFolder
from longhaul.planning import Plan
from longhaul.report.plan_json import plan_json
from longhaul.report.plan_table import plan_notes
from longhaul.report.stage_records import measured, planned_steps, step_seconds
from tests.support.small_configs import plan_of

SITE = {"partitions.0.node.gpu_peak_tflops": 1e-6}
STEPS = [{"mfu": 0.01, "step_time_s": 9000.0}, *[{"mfu": 0.25, "step_time_s": 350.0, "data_wait_s": 10.0}] * 40]


def trained(folder: Path, **attempt: Any) -> Plan:
    """Return a plan whose first stage has trained 41 steps, the first of which was slow."""
    plan = plan_of(folder, {f"stages.{number}.precision": "bf16" for number in (0, 1)}, SITE)
    planned = plan.stage("base")
    stage, weights = planned.stage, WeightsFolder(plan.paths.stage("base").weights / "01")
    write_json(plan.paths.stage("base").job_spec, {"weights_root": str(plan.paths.stage("base").weights)})
    settings = {
        "world_size": 1,
        "nodes": 1,
        "micro_batch_size": 1,
        "activation_checkpointing": "none",
        "zero": stage.zero.model_dump(mode="json"),
        "parallel": stage.parallel.model_dump(),
        **attempt,
    }
    weights.path.mkdir(parents=True)
    weights.attempts.write_text(json.dumps(settings) + "\n")
    weights.metrics.write_text(
        "".join(json.dumps({"step": number, "loss": 1.0, **step}) + "\n" for number, step in enumerate(STEPS, 1))
    )
    return plan


def test_the_speed_of_the_last_steps_replaces_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ten steps of 350 s and 10 s of waiting on one GPU. The other stage has the same features, and takes the MFU."""
    monkeypatch.chdir(tmp_path)
    content = plan_json(trained(tmp_path))
    base, chat = content["stages"]
    assert base["gpu_hours_range"] == [round(10 * 360.0 / 3600, 1)] * 2
    hours = chat["flops"] / (1e6 * 0.25) / 3600
    assert chat["gpu_hours_range"] == [round(hours, 1)] * 2 and hours > 1
    for row in (base, chat):
        assert row["gpu_hours_basis"] == ["the steps of stage base in this run"]
    assert "GPU-hours of stage chat: from the steps of stage base in this run" in plan_notes(content)


@pytest.mark.parametrize("change", [{"world_size": 2}, {"micro_batch_size": 2}, {"parallel": {"tensor": 2}}], ids=str)
def test_the_speed_of_another_layout_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
):
    monkeypatch.chdir(tmp_path)
    plan = trained(tmp_path, **change)
    assert measured(plan.paths.stage("base"), plan.stage("base").stage, step_seconds) is None
    assert "this run" not in plan_json(plan)["stages"][0]["gpu_hours_basis"][0]


def test_steps_of_a_length_in_epochs_are_those_that_the_job_recorded(tmp_path: Path):
    weights = WeightsFolder(tmp_path)
    assert planned_steps(None, None) is planned_steps(None, weights) is None
    write_json(weights.identity, {"steps": 17, "epochs": 2.0})
    assert (planned_steps(None, weights), planned_steps(5, weights)) == (17, 5)
