"""Tries the templates of task files, such as doc_to_text, on the first rows of their local data, before a job is submitted.

fetch tries those of tasks with data of the Hub: lm_eval renders the first row when it builds a task.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from longhaul.config.load_config import LoadedConfig
from longhaul.data.readers.task_rows import TaskRow, first_task_rows
from longhaul.errors import UserError, first_line
from longhaul.planning.evaluation_tasks import TaskFile, read_task_files
from longhaul.runtime.cpu_time_limit import cpu_time_limit, ends_its_process
from longhaul.runtime.memory_limit import memory_limit

_KEYS = ("doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix", "description")
_COLUMN_KEYS = ("doc_to_text", "doc_to_target", "doc_to_choice")
"""Keys in which a single word is meant as a column. lm_eval takes a word that is no column as the text of every prompt."""
_COLUMN = re.compile(r"[A-Za-z_]\w*")
_ROWS = 10
_LIMIT_S, _LIMIT_BYTES = 5, 10**9
"""For one template and one row."""


def check_task_templates(loaded: LoadedConfig) -> None:
    """Try the templates of every task file whose data are on this machine; those that fetch makes may not be there yet.

    Raises:
        UserError: a template fails on one of the first rows, or names a column that the data do not have.
    """
    for stage in loaded.config.stages:
        for file in read_task_files(loaded, stage):
            options = file.config.get("dataset_kwargs") or {}
            changes_rows = options.keys() != {"data_files"}  # by keys such as `field` and `delimiter`
            if not changes_rows and file.data_files and all(path.is_file() for path in file.data_files):
                _check_templates(f"stages.{stage.name}.evaluate.files: {file.path}", file)


def _check_templates(where: str, file: TaskFile) -> None:
    """Raise UserError for a template that fails on a row of the first file of the split that the task evaluates."""
    path = _evaluated_file(where, file.config)
    rows = first_task_rows(path, file.config["dataset_path"], _ROWS)
    columns = dict.fromkeys(
        column
        for source in dict.fromkeys((file.data_files[0], path))  # each split has the columns of the first one
        for row in first_task_rows(source, file.config["dataset_path"], 1)
        for column in row
    )
    templates = {key: value for key in _KEYS if isinstance(value := file.config.get(key), str) and value not in columns}
    for key, template in templates.items() if rows and not file.config.get("use_prompt") else ():
        hint = f"correct {key}; the columns of the data are {', '.join(columns)}"
        if key in _COLUMN_KEYS and _COLUMN.fullmatch(template):
            raise UserError(
                f"{where}: {key} is {template!r}, and {path} has no such column: every row would get this word",
                f"{hint}; for this text in every row, write {{{{ {template!r} }}}}",
            )
        _try_rows(
            f"{where}: {key}", path, partial(_try, key, template, hint), [dict.fromkeys(columns) | row for row in rows]
        )


def _try_rows(where: str, path: Path, try_row: Callable[[str, TaskRow], None], rows: list[TaskRow]) -> None:
    """Raise UserError if a template fails on a row, or has an operation that never ends."""
    named = {f"{where} fails on row {number} of {path}": row for number, row in enumerate(rows, 1)}
    if ends_its_process(lambda: [try_row(name, row) for name, row in named.items()]):
        raise UserError(
            f"{where}: one operation, such as the comparison of nested lists, has no end within {2 * _LIMIT_S} s of CPU time",
            "remove this operation from the template",
        )
    for name, row in named.items():
        try_row(name, row)


def _evaluated_file(where: str, config: dict[str, Any]) -> Path:
    """Return the first file of the split that lm_eval evaluates."""
    named = config["dataset_kwargs"]["data_files"]
    splits = named if isinstance(named, dict) else {"train": named}
    key = next((key for key in ("test_split", "validation_split") if config.get(key)), None)
    if key is None:
        raise UserError(
            f"{where} has neither test_split nor validation_split", f"name the split to evaluate: {', '.join(splits)}"
        )
    if config[key] not in splits:
        raise UserError(
            f"{where}: {key} is {config[key]}, and dataset_kwargs.data_files has no such split",
            f"use one of {', '.join(splits)}",
        )
    files = splits[config[key]]
    return Path(files if isinstance(files, str) else files[0])


def _try(key: str, template: str, hint: str, where: str, row: TaskRow) -> None:
    """Render a template as lm_eval does in the job. Raises UserError if it fails."""
    from longhaul.compat.jinja_sandbox import TaskTemplates  # only here: every parse of the rules imports this module

    try:
        with cpu_time_limit(_LIMIT_S), memory_limit(_LIMIT_BYTES):
            text = TaskTemplates().from_string(template).render(**row)
            choices = ast.literal_eval(text) if key == "doc_to_choice" else []
    except Exception as error:  # a template is a program: it may raise any exception
        raise UserError(f"{where}: {type(error).__name__}: {first_line(error)}", hint) from None
    if not isinstance(choices, list):
        raise UserError(f"{where}: it gives {text[:100]!r} and no list", hint)
