"""compat/lm_eval.py is still needed. A failing test means that lm_eval offers a public way to give a task its data."""

from __future__ import annotations

import inspect
from pathlib import Path

import datasets
import evaluate
import pytest
from jinja2.exceptions import SecurityError
from lm_eval.api.registry import get_metric
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from longhaul.compat.lm_eval import build_tasks
from longhaul.errors import UserError

QUIZ = {
    "task": "quiz",
    "dataset_path": "org/quiz",
    "test_split": "test",
    "doc_to_text": "a",
    "doc_to_target": "b",
}


def test_tasks_call_load_dataset_while_they_are_built_and_take_no_dataset():
    assert "datasets.load_dataset(" in inspect.getsource(ConfigurableTask.download)
    parameters = {*inspect.signature(ConfigurableTask).parameters, *inspect.signature(TaskManager).parameters}
    assert not [name for name in parameters if "dataset" in name or "offline" in name or "revision" in name]


def test_load_dataset_is_restored_after_an_error():
    original = datasets.load_dataset

    def fail(**options: object) -> None:
        raise ValueError(f"asked for {options['path']}")

    with pytest.raises(ValueError, match="asked for org/quiz"):
        build_tasks(["quiz"], {"quiz": QUIZ}, fail)
    assert datasets.load_dataset is original


def test_a_template_reaches_no_shell(tmp_path: Path):
    rows = datasets.DatasetDict({"test": datasets.Dataset.from_list([{"a": "1", "b": "2"}])})
    shell = f"{{{{ cycler.__init__.__globals__.os.system('touch {tmp_path}/done') }}}}"
    with pytest.raises(SecurityError, match="is unsafe"):
        build_tasks(["quiz"], {"quiz": {**QUIZ, "doc_to_text": shell}}, lambda **_: rows)
    assert not (tmp_path / "done").exists()
    found = build_tasks(
        ["quiz"], {"quiz": {**QUIZ, "doc_to_text": "{{ a | regex_replace('1', b) }}"}}, lambda **_: rows
    )
    assert found["quiz"][0].doc_to_text({"a": "1", "b": "2"}) == "2"


def test_a_metric_outside_of_the_registry_is_code_of_the_hub_and_refused():
    assert "hf_evaluate.load(name)" in inspect.getsource(get_metric)
    original = evaluate.load
    own = {"quiz": {**QUIZ, "metric_list": [{"metric": "rouge", "aggregation": "mean", "higher_is_better": True}]}}
    rows = datasets.DatasetDict({"test": datasets.Dataset.from_list([{"a": "1", "b": "2"}])})
    with pytest.raises(UserError, match="task quiz has the metric rouge, which is not part of lm_eval"):
        build_tasks(["quiz"], own, lambda **_: rows)
    assert evaluate.load is original
