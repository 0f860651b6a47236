"""Templates of task files that fail on the first rows of local data are refused by the plan, in the sandbox that the job uses."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from lm_eval import utils

from longhaul.artifacts.atomic_files import write_text
from longhaul.artifacts.paths import RunPaths
from longhaul.cli import main
from longhaul.compat.jinja_sandbox import TaskTemplates
from longhaul.config.load_config import load_config
from longhaul.config.shipped_files import PACKAGE
from longhaul.data import check_task_templates as module
from longhaul.data.check_task_templates import check_task_templates
from longhaul.errors import UserError
from longhaul.fetch import hub_downloads
from tests.support.small_configs import write_config

ROWS = [
    {"question": "1+1", "choices": ["2", "3"], "label": 0},
    {"question": "2+2", "choices": ["4", "5"], "label": 0},
]
TASK: dict[str, Any] = {
    "task": "quiz",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "quiz.jsonl"}},
    "test_split": "test",
    "doc_to_text": "{{question}} {{choices | length}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
}


def written(folder: Path, changes: dict[str, Any]) -> Path:
    """Write a config whose stage `base` is evaluated on the task, and the task's data. Return the config's path."""
    (folder / "quiz.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    (folder / "quiz.yaml").write_text(yaml.safe_dump(TASK | changes))
    evaluate = {"tasks": ["quiz"], "files": ["quiz.yaml"]}
    return write_config(folder, {"stages.0.export": "last", "stages.0.evaluate": evaluate})


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"doc_to_text": "{{questoin}}"},
            r"doc_to_text fails on row 1 of quiz\.jsonl: UndefinedError: 'questoin' is undef",
        ),
        ({"doc_to_target": "lable"}, r"doc_to_target is 'lable', and quiz\.jsonl has no such column"),
        ({"doc_to_text": "{{question"}, "doc_to_text fails on row 1 .* TemplateSyntaxError"),
        ({"doc_to_text": "{{ 1 // (question == '1+1') }}"}, "doc_to_text fails on row 2 .* ZeroDivisionError"),
        ({"doc_to_choice": "{{question}}, {{}}"}, "doc_to_choice fails on row 1"),
        ({"doc_to_choice": "{{label}}"}, "doc_to_choice fails on row 1 .*: it gives '0' and no list"),
        ({"gen_prefix": "{{prefix}}"}, "gen_prefix fails on row 1"),
        ({"description": "{{ 9 ** 99999 }}"}, "description fails on row 1 .* the power is too large"),
        ({"doc_to_text": "{{ cycler.__init__.__globals__ }}"}, "doc_to_text fails on row 1 .* SecurityError"),
        ({"test_split": "tst"}, r"test_split is tst, and dataset_kwargs\.data_files has no such split"),
        ({"test_split": None}, "has neither test_split nor validation_split"),
    ],
)
def test_a_template_that_fails_in_the_job_is_refused_until_it_is_corrected(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(UserError, match=rf"stages\.base\.evaluate\.files: .*quiz\.yaml.*{message}") as refused:
        check_task_templates(load_config(written(tmp_path, changes)))
    assert (
        refused.value.hint.endswith(("question, choices, label", "test")) or "write {{ 'lable' }}" in refused.value.hint
    )
    check_task_templates(load_config(written(tmp_path, {})))


@pytest.mark.parametrize("verb", [("plan",), ("run", "-n", "--quiet")])
def test_verbs_refuse_it_with_exit_code_2(tmp_path: Path, verb: tuple[str, ...]):
    """lm_eval, datasets and torch are not there, as on a login node."""
    config = written(tmp_path, {"doc_to_text": "{{questoin}}"})
    without = "import sys; sys.modules.update(dict.fromkeys(('lm_eval', 'datasets', 'torch', 'transformers')))"
    (tmp_path / "login" / "sitecustomize.py").parent.mkdir()
    (tmp_path / "login" / "sitecustomize.py").write_text(without)
    command = [sys.executable, "-m", "longhaul", verb[0], str(config), *verb[1:]]
    path = f"{tmp_path / 'login'}:{PACKAGE.parent}"
    done = subprocess.run(
        command,
        check=False,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "'questoin' is undefined" in done.stderr, done.stderr
    assert "remedy: correct doc_to_text; the columns of the data are question, choices, label" in done.stderr


def test_fetch_tries_them_on_data_that_it_has_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    data = RunPaths("small").fetched / "quiz.jsonl"
    files = {"data_files": {"test": str(data)}}
    config = written(tmp_path, {"dataset_kwargs": files, "doc_to_text": "{{questoin}}"})
    check_task_templates(load_config(config))  # nothing to read yet
    monkeypatch.setattr(hub_downloads, "pin_sources", lambda _: write_text(data, json.dumps(ROWS[0])))
    with pytest.raises(SystemExit) as ended:
        main(["fetch", str(config), "--only", "sources"])
    assert ended.value.code == 2 and "'questoin' is undefined" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"doc_to_text": "", "doc_to_target": 0, "doc_to_choice": ["a", "b"]},
        {"doc_to_text": "question", "gen_prefix": "Answer", "doc_to_choice": "choices"},
        {"doc_to_text": "{{ 'word' }}", "description": "Answer these."},
        {"doc_to_text": "{{ question | regex_replace('1', 'one') }}"},
        {"doc_to_text": "{{questoin}}", "use_prompt": "promptsource:x"},
        {"dataset_kwargs": {"data_files": {"test": "quiz.jsonl"}, "field": "rows"}, "doc_to_text": "{{other}}"},
    ],
)
def test_tasks_that_the_job_renders_are_accepted(tmp_path: Path, changes: dict[str, Any]):
    check_task_templates(load_config(written(tmp_path, changes)))


@pytest.mark.parametrize("name", ["q.jsonl.gz", "q.json", "q.parquet", "q.arrow", "q.csv", "q.txt"])
def test_rows_of_every_format_are_read(tmp_path: Path, name: str):
    data = tmp_path / name
    table = pyarrow.Table.from_pylist(ROWS)
    dataset_path = {"gz": "json", "txt": "text"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
    if dataset_path == "parquet":
        pyarrow.parquet.write_table(table, data)
    elif dataset_path == "arrow":
        with pyarrow.ipc.new_stream(data, table.schema) as stream:
            stream.write_table(table)
    else:
        lines = "".join(f"{json.dumps(row)}\n" for row in ROWS)
        text = {"q.json": json.dumps(ROWS), "q.csv": "question,label\n1+1,0\n", "q.txt": "1+1\n"}.get(name, lines)
        data.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    changes: dict[str, Any] = {
        "dataset_path": dataset_path,
        "dataset_kwargs": {"data_files": name},
        "test_split": "train",
    }
    changes |= {"doc_to_choice": None, "doc_to_target": "text" if name == "q.txt" else "label"}
    good = "{{text}}" if name == "q.txt" else "{{question}} {{label + 1}}"
    check_task_templates(load_config(written(tmp_path, {**changes, "doc_to_text": good})))
    with pytest.raises(UserError, match="'other' is undefined"):
        check_task_templates(load_config(written(tmp_path, {**changes, "doc_to_text": "{{other}}"})))


def test_columns_of_later_rows_are_columns(tmp_path: Path):
    config = written(tmp_path, {"doc_to_text": "{{question}}{{late}}"})
    with Path("quiz.jsonl").open("a") as stream:
        stream.write('{"question": "3+3", "choices": ["6"], "label": 0, "late": 1}\n')
    check_task_templates(load_config(config))


def test_a_template_has_a_limit_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_LIMIT_S", 0.1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="CpuTimeExceeded"):
        check_task_templates(load_config(written(tmp_path, {"doc_to_text": endless})))


def test_an_operation_that_never_ends_is_refused_until_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No signal handler runs within one operation of Python: only the end of a process ends it."""
    monkeypatch.setattr(module, "_LIMIT_S", 0.1)
    loop = "{% for _ in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}"
    nested = "{% set n = namespace(a=[], b=[]) %}" + loop
    with pytest.raises(UserError, match=r"doc_to_text: one operation, .* no end within 0\.2 s of CPU time"):
        check_task_templates(load_config(written(tmp_path, {"doc_to_text": nested + "{{ n.a == n.b }}"})))
    check_task_templates(load_config(written(tmp_path, {"doc_to_text": nested})))


def test_the_sandbox_has_what_the_templates_of_lm_eval_have():
    """Compared with a new copy of lm_eval's module: a task that another test has run replaces the environment of the first."""
    spec = importlib.util.spec_from_file_location("lm_eval_utils", utils.__file__)
    assert spec and spec.loader
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    sandbox, env = TaskTemplates(), original.env
    assert not isinstance(env, TaskTemplates)
    assert (sandbox.undefined, sandbox.keep_trailing_newline) == (env.undefined, env.keep_trailing_newline)
    assert sandbox.filters.keys() == env.filters.keys()
    assert sandbox.globals.keys() == env.globals.keys() and sandbox.trim_blocks == env.trim_blocks
