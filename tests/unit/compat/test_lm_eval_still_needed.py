"""compat/lm_eval.py is still needed. A failing test means that lm_eval offers a public way to give a task its data."""

from __future__ import annotations

import inspect
from pathlib import Path

import datasets
import evaluate
import pytest
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

    with pytest.raises(UserError, match="ValueError: asked for org/quiz"):
        build_tasks(["quiz"], {"quiz": QUIZ}, fail)
    assert datasets.load_dataset is original


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"test_split": "tst"}, "KeyError: 'tst'"),
        ({"docs_to_text": "a"}, "TypeError: .* unexpected keyword argument 'docs_to_text'"),
        ({"dataset_kwargs": {"name": "en"}}, "TypeError: .* multiple values for keyword argument 'name'"),
        ({"doc_to_text": "{{ nothing }}"}, "UndefinedError: 'nothing' is undefined"),
        ({"output_type": "essay"}, "ValueError: Got invalid output_type 'essay'"),
    ],
)
def test_a_task_whose_keys_are_wrong_is_named(keys: dict[str, object], message: str):
    """lm_eval raises errors of many types. A KeyError was taken for the answer that it has no such task."""
    rows = datasets.DatasetDict({"test": datasets.Dataset.from_list([{"a": "1", "b": "2"}])})
    with pytest.raises(UserError, match=f"cannot build task quiz from its keys and its data: {message}"):
        build_tasks(["quiz"], {"quiz": {**QUIZ, **keys}}, lambda path, name, **_: rows)


def test_a_template_reaches_no_shell(tmp_path: Path):
    rows = datasets.DatasetDict({"test": datasets.Dataset.from_list([{"a": "1", "b": "2"}])})
    shell = f"{{{{ cycler.__init__.__globals__.os.system('touch {tmp_path}/done') }}}}"
    with pytest.raises(UserError, match=r"SecurityError: .* is unsafe"):
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
