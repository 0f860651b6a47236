"""Evaluation tasks of a run: reads task files of the user, checks them, and finds the model that a stage starts from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from longhaul.artifacts.paths import RunPaths
from longhaul.artifacts.task_data_lock import (
    LOCAL_FORMATS,
    named_files,
    places_of_data,
    reads_local_files,
    rename_files,
)
from longhaul.config.field_types import HUB_REPOSITORY_PATTERN
from longhaul.config.load_config import LoadedConfig, names_a_file
from longhaul.config.run_config import Config
from longhaul.config.shipped_files import data_root
from longhaul.config.stage_config import Stage
from longhaul.config.strict_yaml import read_yaml
from longhaul.errors import UserError

EvaluatedModel = Literal["trained", "start"]
SHIPPED_TASKS = data_root() / "config" / "evaluation"
_CODE_KEYS = ("class", "custom_dataset", "include")
# fmt: off
TASK_KEYS = frozenset({
    "custom_dataset", "dataset_kwargs", "dataset_name", "dataset_path", "description", "doc_to_audio", "doc_to_choice",
    "doc_to_decontamination_query", "doc_to_image", "doc_to_target", "doc_to_text", "fewshot_config", "fewshot_delimiter",
    "fewshot_split", "filter_list", "gen_prefix", "generation_kwargs", "metadata", "metric_list", "num_fewshot", "output_type",
    "process_docs", "process_results", "repeats", "should_decontaminate", "tag", "target_delimiter", "task", "task_alias",
    "test_split", "training_split", "unsafe_code", "use_prompt", "validation_split",
})
METRICS = frozenset({
    "acc", "acc_all", "acc_bytes", "acc_mutual_info", "acc_norm", "bits_per_byte", "bleu", "brier_score", "bypass",
    "byte_perplexity", "chrf", "chrf++", "exact_match", "f1", "likelihood", "mcc", "perplexity", "ter", "word_perplexity",
})
AGGREGATIONS = frozenset({
    "bits_per_byte", "bleu", "brier_score", "bypass", "chrf", "chrf++", "f1", "matthews_corrcoef", "mean", "median", "nanmean",
    "perplexity", "ter", "weighted_perplexity",
})
# fmt: on
"""Keys of a task, and names in the registries, of lm_eval 0.4.13, which planning does not import. For other metrics, lm_eval runs
code of the Hub."""


@dataclass(frozen=True)
class TaskFile:
    """One task file of the user.

    config:     its keys, in the format of lm-evaluation-harness (docs/task_guide.md there), with the run's name for {run}
    data_files: files on this machine that the task reads; () where it reads a repository of the Hub
    """

    path: Path
    task: str
    config: dict[str, Any]
    data_files: tuple[Path, ...]


def read_task_files(loaded: LoadedConfig, stage: Stage) -> list[TaskFile]:
    """Read and check the task files of a stage.

    Raises:
        UserError: a file is missing, is no task, or names Python code; or a data file is missing.
    """
    if stage.evaluate is None:
        return []
    key = f"stages.{stage.name}.evaluate.files"
    paths = [_task_path(loaded, key, written) for written in stage.evaluate.files]
    run = loaded.config.run
    return [_read_task_file(key, path, run, path.stat().st_mtime_ns if path.exists() else 0) for path in paths]


def _task_path(loaded: LoadedConfig, key: str, written: str) -> Path:
    """Return the path of a task file: the one of this name in config/evaluation, or a path relative to the config file."""
    if names_a_file(written):
        return loaded.resolve(key, written)
    return SHIPPED_TASKS / f"{written}.yaml"


@cache
def _read_task_file(key: str, path: Path, run: str, _changed_ns: int) -> TaskFile:
    """Read a task file once per process until it changes: a plan asks for each several times."""
    config: dict[str, Any] = read_yaml(path)
    task = config.get("task")
    if not isinstance(task, str):
        raise UserError(
            f"{key}: {path} has no key `task`", "give a task file of lm-evaluation-harness: a name, data, a metric"
        )
    if code := [name for name in _CODE_KEYS if name in config]:
        raise UserError(
            f"{key}: {path} has the key {code[0]}, which brings other files or Python code into the task",
            "write all keys of the task into the file, and use templates such as doc_to_text",
        )
    if not isinstance(config.get("dataset_path"), str):
        raise UserError(
            f"{key}: {path} has no key `dataset_path`",
            f"use one of {', '.join(LOCAL_FORMATS)}, or a repository of the Hub",
        )
    if not isinstance(config.get("dataset_kwargs") or {}, dict):
        raise UserError(
            f"{key}: {path}: dataset_kwargs is {config['dataset_kwargs']!r} and no mapping",
            "write it as {data_files: FILE.jsonl}, for example",
        )
    if unknown := sorted(set(map(str, config)) - TASK_KEYS):
        raise UserError(
            f"{key}: {path} has the key {unknown[0]}, which tasks of lm_eval do not have",
            f"correct or remove it; the keys are {', '.join(sorted(TASK_KEYS - {'custom_dataset'}))}",
        )
    _check_data(f"{key}: {path}", config["dataset_path"], named_files(config.get("dataset_kwargs") or {}))
    check_one_place(f"{key}: {path}", config["dataset_path"], config.get("dataset_kwargs") or {})
    _check_metrics(f"{key}: {path}", config.get("metric_list") or [])
    config = _name_run_in_data_files(config, run)
    return TaskFile(path, task, config, _local_files(config))


def _check_data(where: str, dataset: str, files: list[str]) -> None:
    """Raise UserError unless fetch can pin the data of a task, or the plan can list its local files."""
    from_files = (
        f"for files of this machine, use one of {', '.join(LOCAL_FORMATS)}, and name them in dataset_kwargs.data_files"
    )
    if dataset in LOCAL_FORMATS and not files:
        raise UserError(f"{where}: dataset_path is {dataset}, and dataset_kwargs has no data_files", from_files)
    if not re.fullmatch(HUB_REPOSITORY_PATTERN, dataset):
        raise UserError(f"{where}: dataset_path {dataset} is no repository of the Hub", from_files)
    if url := next((file for file in files if "://" in file and not file.startswith("hf://datasets/")), None):
        raise UserError(
            f"{where} reads {url}, which has no revision to pin",
            "download it and give the path of the file, or name a file of the Hub: hf://datasets/OWNER/NAME/FILE",
        )


def check_one_place(where: str, dataset: str, options: dict[str, Any]) -> None:
    """Raise UserError if load_dataset(dataset, **options) reads several repositories: fetch pins the commit of one."""
    places = places_of_data(dataset, options)
    if len(places) > 1:
        raise UserError(
            f"{where}: the data are in {' and '.join(places)}, and one dataset has one commit to pin",
            "write a task for each repository and revision; or download the files, and name them in dataset_kwargs.data_files",
        )


def _name_run_in_data_files(config: dict[str, Any], run: str) -> dict[str, Any]:
    """Return a task's keys with the run's name for {run} in its data files: the demo's are below results/{run}."""

    options = config.get("dataset_kwargs") or {}
    if "data_files" not in options:
        return config
    named = rename_files(options["data_files"], lambda file: file.replace("{run}", run))
    return {**config, "dataset_kwargs": {**options, "data_files": named}}


def _check_metrics(where: str, metrics: Any) -> None:
    """Raise UserError unless lm_eval itself has every metric and aggregation of a task's key `metric_list`."""
    if not isinstance(metrics, list) or not all(isinstance(item, dict) and "metric" in item for item in metrics):
        raise UserError(
            f"{where}: metric_list is {metrics!r}, and no list of items with a metric",
            "write it as [{metric: acc}], for example",
        )
    for item in metrics:
        name, aggregation = item["metric"], item.get("aggregation", "mean")
        if item.get("hf_evaluate"):
            raise UserError(
                f"{where}: hf_evaluate of the metric {name} downloads Python code of the Hub", "remove hf_evaluate"
            )
        if not isinstance(name, str) or name not in METRICS:
            raise UserError(
                f"{where}: the metric {name} is not part of lm_eval, which would download Python code of the Hub and run it",
                f"use metrics of lm_eval: {', '.join(sorted(METRICS))}",
            )
        if not isinstance(aggregation, str) or aggregation not in AGGREGATIONS:
            raise UserError(
                f"{where}: lm_eval has no aggregation {aggregation} for the metric {name}",
                f"use one of {', '.join(sorted(AGGREGATIONS))}",
            )


def _local_files(config: dict[str, Any]) -> tuple[Path, ...]:
    options = config.get("dataset_kwargs") or {}
    return tuple(map(Path, named_files(options))) if reads_local_files(config["dataset_path"], options) else ()


def check_evaluations(loaded: LoadedConfig) -> None:
    """Raise UserError for an evaluation that could not run: a missing file, a task twice, no starting model."""
    fetched = RunPaths(loaded.config.run).fetched
    for stage in loaded.config.stages:
        files = read_task_files(loaded, stage)
        key = f"stages.{stage.name}.evaluate"
        for file in files:
            for data in file.data_files:
                if not data.is_file() and not data.is_relative_to(fetched):
                    raise UserError(
                        f"{key}.files: {file.path} reads {data}, which does not exist",
                        "give the path of the data file, relative to the folder in which longhaul runs",
                    )
            if stage.evaluate and file.task not in stage.evaluate.tasks:
                raise UserError(
                    f"{key}.files: no task of {key}.tasks is in {file.path}",
                    f"add {file.task} to tasks, or remove the file",
                )
        names = [file.task for file in files]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(
                f"{key}.files: two files define the task {twice[0]}",
                "change `task` in one of them, and add it to tasks",
            )
        if stage.evaluate and stage.evaluate.starting_model:
            _check_starting_model(loaded.config, stage)
    _check_job_names(loaded.config)


def _check_job_names(config: Config) -> None:
    """Raise UserError if two evaluations have one name: as a job, which joins names with `-`, or in Slurm, with `_`."""
    jobs = [
        (stage.name, model, task)
        for stage in config.stages
        for model in evaluated_models(stage)
        for task in (stage.evaluate.tasks if stage.evaluate else ())
    ]
    for separator in "-_":
        named: dict[str, tuple[str, str, str]] = {}
        for job in jobs:
            name = separator.join(("evaluate", *job))
            first = named.setdefault(name, job)
            if first != job:
                raise UserError(
                    f"stages.{job[0]}.evaluate: task {job[2]} and task {first[2]} of stage {first[0]} have the same job name "
                    f"{name}",
                    "give one of the two stages another name",
                )


def _check_starting_model(config: Config, stage: Stage) -> None:
    key = f"stages.{stage.name}.evaluate.starting_model"
    if stage.start_from is None:
        if config.model.pretrained is None:
            raise UserError(f"{key}: the stage starts from random weights", "remove the key")
        return
    earlier = next(other for other in config.stages if other.name == stage.start_from.stage)
    if earlier.export != stage.start_from.checkpoint:
        raise UserError(
            f"{key}: the stage starts from the {stage.start_from.checkpoint} checkpoint of {earlier.name}, whose export is "
            f"{earlier.export}",
            f"set stages.{earlier.name}.export to {stage.start_from.checkpoint}, or remove the key",
        )


def own_task(loaded: LoadedConfig, stage: Stage, task: str) -> TaskFile | None:
    """Return the user's file of a task; None for a task or group of lm_eval."""
    return next((file for file in read_task_files(loaded, stage) if file.task == task), None)


def reads_hub(own: TaskFile | None) -> bool:
    """Return whether a task reads repositories of the Hub, so that fetch downloads them. own: its file, or None"""
    return own is None or not own.data_files


def tasks_to_fetch(loaded: LoadedConfig, stage: Stage) -> list[str]:
    """Return the tasks of a stage whose data fetch downloads."""
    tasks = stage.evaluate.tasks if stage.evaluate else ()
    return [task for task in tasks if reads_hub(own_task(loaded, stage, task))]


def evaluated_models(stage: Stage) -> list[EvaluatedModel]:
    """Return which models of a stage are evaluated."""
    if stage.evaluate is None:
        return []
    return ["start", "trained"] if stage.evaluate.starting_model else ["trained"]
