"""Tasks that lm_eval does not have, that miss a package, or whose metrics are code of the Hub, are refused by fetch."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import manager

from longhaul.errors import UserError
from longhaul.fetch.hub_splits import _json_line
from longhaul.fetch.task_data import pin_task_data
from tests.support.small_configs import plan_of

TASK = {"dataset_path": "json", "test_split": "test", "doc_to_text": "a", "doc_to_target": "b"}


@pytest.fixture(autouse=True)
def _tasks_of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval reads 14,000 files of tasks beside its task manager; here it has three.

    The metric of one is code of the Hub, the code of another imports a package that is not installed, and the data of the last
    are in two repositories.
    """
    folder = tmp_path / "lm_eval_tasks"
    folder.mkdir()
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    rouge = {"metric": "rouge", "aggregation": "mean", "higher_is_better": True}
    task = {**TASK, **data, "task": "summaries", "metric_list": [rouge]}
    (folder / "summaries.yaml").write_text(yaml.safe_dump(task))
    code = yaml.safe_dump({**task, "task": "instructions"}).replace(
        "doc_to_text: a", "doc_to_text: !function utils.text"
    )
    (folder / "instructions.yaml").write_text(code)
    places = {"data_files": {"train": "hf://datasets/a/b/x.jsonl", "test": "hf://datasets/c/d/x.jsonl"}}
    (folder / "mixed.yaml").write_text(
        yaml.safe_dump({**task, "task": "mixed", "dataset_kwargs": places, "metric_list": []})
    )
    (folder / "utils.py").write_text("import package_of_an_extra\n")
    (folder / "rows.jsonl").write_text('{"a": "1", "b": "2"}\n')
    monkeypatch.setattr(manager, "__file__", str(folder / "manager.py"))


@pytest.mark.parametrize(
    ("task", "message", "hint"),
    [
        ("summarise", r"stages\.base\.evaluate\.tasks: lm_eval has no task or group 'summarise'", "lm_eval ls tasks"),
        ("instructions", "task instructions needs the package package_of_an_extra", "in the job environment"),
        ("summaries", "task summaries has the metric rouge, .* is downloaded from the Hub and run", "another task"),
        (
            "mixed",
            r"task mixed: the data are in a/b@main and c/d@main, and one dataset has one commit",
            "each repository",
        ),
    ],
)
def test_task_that_cannot_run_is_refused_until_another_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, message: str, hint: str
):
    monkeypatch.chdir(tmp_path)
    plan = plan_of(tmp_path, {"stages.0.export": "last", "stages.0.evaluate": {"tasks": [task]}})
    with pytest.raises(UserError, match=message) as refused:
        pin_task_data(plan.loaded, "base", task)
    assert hint in refused.value.hint and not (tmp_path / "results").exists()
    own = {**TASK, "task": "sums", "dataset_kwargs": {"data_files": {"test": "lm_eval_tasks/rows.jsonl"}}}
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(own | {"metric_list": [{"metric": "exact_match"}]}))
    evaluate = {"tasks": ["sums"], "files": ["sums.yaml"]}
    plan = plan_of(tmp_path, {"stages.0.export": "last", "stages.0.evaluate": evaluate})
    pin_task_data(plan.loaded, "base", "sums")
    assert (tmp_path / "results").exists()


def test_task_file_that_lm_eval_cannot_use_is_refused_until_it_is_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    data = {"dataset_kwargs": {"data_files": {"test": "lm_eval_tasks/rows.jsonl"}}}
    evaluate = {"tasks": ["sums"], "files": ["sums.yaml"]}
    for split in ("tset", "test"):
        task = {**TASK, **data, "task": "sums", "test_split": split, "metric_list": [{"metric": "exact_match"}]}
        (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))
        loaded = plan_of(tmp_path, {"stages.0.export": "last", "stages.0.evaluate": evaluate}).loaded
        if split == "test":
            pin_task_data(loaded, "base", "sums")
        else:
            with pytest.raises(UserError, match=r"lm_eval cannot build task sums .*\s+remedy: correct the task file"):
                pin_task_data(loaded, "base", "sums")


def test_column_that_is_no_text_is_refused_until_another_is_named():
    row = {"picture": b"png", "body": "text"}
    with pytest.raises(UserError, match=r"row 1: .*\s+remedy: set the dataset's `columns` to text columns"):
        _json_line(row, ["picture"], "row 1")
    assert _json_line(row, ["body"], "row 1") == '{"body": "text"}\n'
