"""Records of a stage: its speed replaces the estimate of the plan; its packs give padding and cuts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.atomic_files import write_json
from longhaul.artifacts.pack_totals import PackTotals, cut_loss_share, left_out_share, share_of_padding
from longhaul.artifacts.paths import WeightsFolder
from longhaul.planning import Plan
from longhaul.report.plan_json import plan_json
from longhaul.report.plan_table import plan_notes, stage_table
from longhaul.report.stage_records import last_trained, measured, planned_steps, read_pack_totals, step_seconds
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


def test_weights_of_the_last_attempt_are_found_in_a_copied_run(tmp_path: Path):
    """Copying changes the times of files. Weights without an attempt were not trained."""
    times = {"01": "2026-11-28T10:00:00+00:00", "02": "2026-11-29T09:00:00+00:00", "03": "2026-11-28T23:00:00+00:00"}
    for name, time in times.items():
        attempts = WeightsFolder(tmp_path / name).attempts
        attempts.parent.mkdir()
        attempts.write_text(
            json.dumps({"time": "2026-01-01T00:00:00+00:00"}) + "\n" + json.dumps({"time": time}) + "\n"
        )
    os.utime(WeightsFolder(tmp_path / "02").attempts, (1, 1))
    (tmp_path / "04").mkdir()
    found = last_trained(tmp_path)
    assert found is not None and found.path == tmp_path / "02"
    assert last_trained(tmp_path / "04") is None


def test_shares_cover_all_datasets_of_a_mixture(tmp_path: Path):
    weights = WeightsFolder(tmp_path)
    weights.samples.mkdir()
    for name, packs, tokens in (("a", 3, 250), ("b", 1, 50)):
        row = {"documents": 9, "packs": packs, "sequence_length": 100, "tokens": tokens, "cut_documents": 0}
        row |= {"padding_share": 0.5, "loss_tokens": 2 * tokens, "cut_loss_tokens": packs}
        (weights.samples / f"pack-{name}-train-100-0-right.json").write_text(json.dumps(row))
    (weights.samples / "pack-a-validation-100-0-right.json").write_text("{}")
    packs = read_pack_totals(weights)
    assert share_of_padding(packs) == pytest.approx(0.25)
    assert cut_loss_share(packs) == pytest.approx(4 / 600)
    assert read_pack_totals(WeightsFolder(tmp_path / "none")) == []
    assert share_of_padding([]) is None and cut_loss_share([]) is None


def test_packs_of_an_older_release_tell_nothing_about_cuts():
    old: PackTotals = {
        "documents": 1,
        "packs": 1,
        "sequence_length": 4,
        "tokens": 3,
        "cut_documents": 0,
        "padding_share": 0.25,
    }
    assert cut_loss_share([old]) is None and left_out_share([old]) is None and share_of_padding([old]) == 0.25


def test_the_plan_shows_padding_and_cuts_of_the_same_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The shares are those of the report. Packs of another length or truncation say nothing about the planned stage."""
    monkeypatch.chdir(tmp_path)
    plan = trained(tmp_path)
    stage, weights = plan.stage("base").stage, WeightsFolder(plan.paths.stage("base").weights / "01")
    assert plan_json(plan)["stages"][0]["padding_share"] is None
    weights.samples.mkdir()
    totals = {
        "documents": 9,
        "packs": 2,
        "sequence_length": 64,
        "tokens": 96,
        "cut_documents": 1,
        "padding_share": 0.25,
    }
    record = json.dumps({**totals, "loss_tokens": 50, "cut_loss_tokens": 2})
    (weights.samples / "pack-0-train-64-0-right.json").write_text(record)
    for other in ("128-0-right", "64-0-left"):
        (weights.samples / f"pack-0-train-{other}.json").write_text(record.replace("96", "1"))
    content = plan_json(plan)
    row = content["stages"][0]
    assert (stage.sequence_length, row["padding_share"], row["cut_loss_share"]) == (64, 0.25, 0.04)
    names, values, *_ = ([str(cell) for cell in column.cells] for column in stage_table(content["stages"]).columns)
    shown = dict(zip(names, values, strict=True))
    assert shown["padding in the packs"] == "25.0%" and shown["loss tokens cut from long conversations"] == "4.0%"
