"""`longhaul tune` lists the settings that `auto` chooses from, and marks the one of the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longhaul.errors import UserError
from longhaul.planning import Plan
from longhaul.planning.gpu_memory import GIB, estimate_gpu_memory
from longhaul.planning.needed_nodes import USED_SHARE
from longhaul.report.tuning_table import print_tuning_tables, tuning_rows
from tests.support.small_configs import plan_of

AUTO = {
    "stages.0.micro_batch_size": "auto",
    "stages.0.activation_checkpointing": "auto",
    "stages.0.global_batch_size": 12,
    "stages.0.precision": "bf16",
}
H100 = {"partitions.0.node.gpus": 1, "accelerator": {"cuda": "13.0"}}


def plan(folder: Path, memory_gib: float | None, **keys: Any) -> Plan:
    changes = {**AUTO, **{f"stages.0.{key}": value for key, value in keys.items()}}
    return plan_of(folder, changes, {**H100, "partitions.0.node.gpu_memory_gib": memory_gib})


def rows(made: Plan) -> list[list[str]]:
    return list(tuning_rows(made, made.stages[0]))


def needed_gib(folder: Path, micro: int) -> float:
    stage = plan(folder, 80, micro_batch_size=micro, activation_checkpointing="none").stages[0]
    assert stage.sizes
    return estimate_gpu_memory(stage.stage, stage.sizes, 1).total / GIB


def test_every_setting_that_fits_is_listed_and_the_smallest_that_does_not(tmp_path: Path):
    found = rows(plan(tmp_path, needed_gib(tmp_path, 4) / USED_SHARE * 1.000001))
    without = [row for row in found if row[0] == "none"]
    assert [(row[1], row[2], row[4]) for row in without] == [
        ("1", "12", "yes"), ("2", "6", "yes"), ("3", "4", "yes"), ("4", "3", "yes"), ("6", "2", "no"),
    ]  # fmt: skip
    assert [row[0] for row in found] == sorted((row[0] for row in found), key=["none", "selective", "full"].index)
    (chosen,) = [row for row in found if row[6]]
    assert chosen[:2] == ["none", "4"] and chosen[5:] == ["yes", "this plan"]
    assert float(chosen[3]) == pytest.approx(needed_gib(tmp_path, 4), abs=0.05)


def test_values_of_the_config_are_marked_too(tmp_path: Path):
    found = rows(plan(tmp_path, 80, micro_batch_size=2, activation_checkpointing="full"))
    assert [row[:2] for row in found if row[6]] == [["full", "2"]]


def test_settings_that_are_not_compiled_are_marked(tmp_path: Path):
    settings = {"micro_batch_size": 2, "activation_checkpointing": "none"}
    assert {row[5] for row in rows(plan(tmp_path, 80, **settings))} == {"yes"}
    assert {row[5] for row in rows(plan(tmp_path, 80, **settings, compile="off"))} == {"no"}


def test_without_the_memory_of_a_gpu_nothing_is_said_to_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = plan(tmp_path, None, micro_batch_size=2, activation_checkpointing="none")
    assert {row[4] for row in rows(made)} == {"unknown"}
    print_tuning_tables(made)
    assert "does not state node.gpu_memory_gib" in capsys.readouterr().out


def test_a_hub_model_must_be_fetched_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = plan(tmp_path, 80, micro_batch_size=2, activation_checkpointing="none")
    unknown = replace(made, stages=(replace(made.stages[0], sizes=None),))
    with pytest.raises(UserError, match=r"the size of its model is not known yet\s+remedy: run `longhaul fetch` first"):
        print_tuning_tables(unknown)
    print_tuning_tables(made)
    assert "micro" in capsys.readouterr().out
