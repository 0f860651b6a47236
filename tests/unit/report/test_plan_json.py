"""plan.json and the plan table state what follows from a config."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.config.stage_config import Parallel
from longhaul.report.plan_json import layout_text, plan_json
from longhaul.report.plan_table import plan_notes, print_plan
from tests.support.small_configs import plan_of


def test_layout_names_only_axes_with_several_ranks() -> None:
    assert layout_text(Parallel()) == "data parallel"
    assert layout_text(Parallel(pipeline=2, tensor=4)) in ("pipeline 2, tensor 4", "tensor 4, pipeline 2")


def test_stage_rows_state_batch_and_allocation(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    row, planned = plan_json(plan)["stages"][0], plan.stages[0]
    assert row["global_batch_size"] == row["micro_batch_size"] * row["accumulation"] * row["data_parallel"]
    assert row["gpu_hours_per_allocation"] == round(planned.world_size * planned.stage.minutes / 60, 2)
    assert planned.checkpoint_bytes and row["checkpoint_gb"] == round(planned.checkpoint_bytes / 1e9, 3)


def test_table_shows_every_stage_and_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path)
    print_plan(plan)
    printed = capsys.readouterr().out
    assert plan.run in printed and all(stage.name in printed for stage in plan.stages)
    assert ("Slurm requests" in printed) == (plan.site.scheduler == "slurm")


def test_data_files_are_listed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("README.md", "1.txt", "2.TXT"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("text")
    plan = plan_of(tmp_path, {"datasets.prose": {"kind": "text", "files": ["data"]}})
    (row,) = plan_json(plan)["datasets"]
    assert (row["name"], row["formats"], row["count"], row["bytes"]) == ("prose", ["text"], 2, 8)
    assert row["files"] == [str(tmp_path / "data" / name) for name in ("1.txt", "2.TXT")]
    assert row["left_out"] == [str(tmp_path / "data" / "README.md")]
    print_plan(plan)
    printed = capsys.readouterr().out
    assert "Data files" in printed and "README.md" in printed


def test_notes_follow_the_tables() -> None:
    dataset = {"name": "d", "unread_columns": ["id", "url"], "template_keys": ["tool.tool_call_id"]}
    dataset |= {"rows_read": 120, "files_read": 2, "count": 3}
    content = {
        "stages": [
            {
                "name": "s",
                "warnings": ["w"],
                "gpu_hours_range": [1.0, 2.0],
                "gpu_hours_basis": ["a", "b"],
                "gpu_hours_unmeasured": ["offload"],
            }
        ],
        "datasets": [dataset],
        "warnings": ["v"],
        "scale_test": {"stage": "s", "nodes": [2, 4], "steps": 25, "left_out": {"1": "too small"}},
        "pretrained_changes": ["f"],
        "deferred_checks": ["c"],
    }
    assert plan_notes(content) == [
        "pretrained weights: f",
        "warning: v",
        "warning: w",
        "warning: dataset d: nothing reads the columns id, url, found in 120 rows, the first of 2 of 3 files",
        "warning: dataset d: longhaul does not read the message keys tool_call_id of role tool, found in 120 rows, the first of "
        "2 of 3 files. Nothing of them reaches the text unless the chat template writes them. If the model must see them, use a "
        "template that writes them, or move them into content",
        "scale test before stage s: 25 steps on 2, 4 nodes; scale_test: off skips it",
        "scale test leaves out 1 node: too small",
        "GPU-hours of stage s: from a; b. None of these was measured with offload",
        "not known yet: c",
    ]
