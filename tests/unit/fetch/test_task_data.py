"""Tasks that lm_eval does not have, that miss a package, or whose metrics are code of the Hub, are refused by fetch."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import manager

from longhaul.errors import UserError
from longhaul.fetch.task_data import pin_task_data
from tests.support.small_configs import plan_of


@pytest.fixture(autouse=True)
def _tasks_of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval reads 14,000 files of tasks beside its task manager; here it has three.

    The metric of one is code of the Hub, the code of another imports a package that is not installed, and the data of the last
    are in two repositories.
    """
    folder = tmp_path / "lm_eval_tasks"
    folder.mkdir()
    task = {
        "task": "summaries",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "a",
        "doc_to_target": "b",
        "metric_list": [{"metric": "rouge", "aggregation": "mean", "higher_is_better": True}],
    }
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
def test_task_that_cannot_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, message: str, hint: str
):
    monkeypatch.chdir(tmp_path)
    plan = plan_of(tmp_path, {"stages.0.export": "last", "stages.0.evaluate": {"tasks": [task]}})
    with pytest.raises(UserError, match=message) as refused:
        pin_task_data(plan.loaded, "base", task)
    assert hint in refused.value.hint and not (tmp_path / "results").exists()
