"""Evaluations that could not run are refused by the plan, and each task of each model is a job."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from longhaul.artifacts.atomic_files import write_text
from longhaul.artifacts.paths import JobId
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_kinds, job_request, job_rerun_key, job_spec
from longhaul.jobs.kinds.evaluate_job import EvaluateSpec, evaluation_inputs
from longhaul.planning import Plan
from longhaul.planning.evaluation_tasks import AGGREGATIONS, METRICS, TASK_KEYS, read_task_files, tasks_to_fetch
from longhaul.scheduling.prune_results import find_old_results
from longhaul.scheduling.snakefile_functions import fetch_key, task_data_key
from tests.support.small_configs import plan_of

QUIZ: dict[str, Any] = {
    "task": "quiz",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "quiz.jsonl"}},
}


def planned(folder: Path, evaluate: dict[str, Any], task: dict[str, Any] | None = None, **config: Any) -> Plan:
    """Return the plan of a config whose stage `chat` is evaluated, with quiz.yaml beside it and the working folder there."""
    (folder / "quiz.yaml").write_text(yaml.safe_dump({**QUIZ, **(task or {})}))
    (folder / "quiz.jsonl").write_text("{}\n")
    return plan_of(folder, {"stages.1.export": "last", "stages.1.evaluate": evaluate, **config})


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("evaluate", "task", "config", "message"),
    [
        ({"tasks": ["quiz"], "files": ["missing.yaml"]}, {}, {}, r"missing\.yaml does not exist"),
        ({"tasks": ["quiz"], "files": ["quiz.yaml"]}, {"task": None}, {}, "has no key `task`"),
        ({"tasks": ["quiz"], "files": ["quiz.yaml"]}, {"dataset_path": None}, {}, "has no key `dataset_path`"),
        ({"tasks": ["quiz"], "files": ["quiz.yaml"]}, {"include": "other.yaml"}, {}, "has the key include"),
        ({"tasks": ["quiz"], "files": ["quiz.yaml"]}, {"class": "x.y"}, {}, "has the key class"),
        (
            {"tasks": ["quiz"], "files": ["quiz.yaml"]},
            {"dataset_kwargs": {"data_files": "none.jsonl"}},
            {},
            r"reads none\.jsonl, which does not exist",
        ),
        ({"tasks": ["arc_easy"], "files": ["quiz.yaml"]}, {}, {}, r"no task of stages\.chat\.evaluate\.tasks is in"),
        ({"tasks": ["quiz"], "files": ["quiz.yaml", "quiz.yaml"]}, {}, {}, "two files define the task quiz"),
        (
            {"tasks": ["quiz"], "files": ["quiz.yaml"]},
            {"metric_list": [{"metric": "acc"}, {"metric": "rouge"}]},
            {},
            "the metric rouge is not part of lm_eval, which would download Python code",
        ),
        (
            {"tasks": ["quiz"], "files": ["quiz.yaml"]},
            {"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]},
            {},
            "hf_evaluate of the metric exact_match downloads Python code",
        ),
        (
            {"tasks": ["quiz"], "files": ["quiz.yaml"]},
            {"metric_list": [{"metric": "acc", "aggregation": "sum"}]},
            {},
            "lm_eval has no aggregation sum for the metric acc",
        ),
        (
            {"tasks": ["quiz"], "files": ["quiz.yaml"]},
            {"metric_list": "acc"},
            {},
            "metric_list is 'acc', and no list of items",
        ),
        (
            {"tasks": ["quiz"], "files": ["quiz.yaml"]},
            {"dataset_kwargs": ["quiz.jsonl"]},
            {},
            r"quiz.yaml: dataset_kwargs is \['quiz.jsonl'\] and no mapping",
        ),
        (
            {"tasks": ["quiz"], "files": ["quiz.yaml"]},
            {"docs_to_text": "a"},
            {},
            "has the key docs_to_text, which tasks of lm_eval do not have",
        ),
        (
            {"tasks": ["quiz"], "files": ["quiz.yaml"]},
            {"dataset_kwargs": {"data_dir": "data"}},
            {},
            "dataset_path is json, and dataset_kwargs has no data_files",
        ),
        (
            {"tasks": ["quiz"], "files": ["quiz.yaml"]},
            {"dataset_path": "./data"},
            {},
            r"dataset_path \./data is no repository of the Hub",
        ),
        (
            {"tasks": ["quiz"], "files": ["quiz.yaml"]},
            {"dataset_kwargs": {"data_files": {"test": "https://a.example/b.jsonl"}}},
            {},
            r"reads https://a\.example/b\.jsonl, which has no revision to pin",
        ),
        ({"tasks": ["quiz", "quiz"]}, {}, {}, "tasks contains quiz twice"),
        ({"tasks": ["a/../b"]}, {}, {}, "a/../b"),
        (
            {"tasks": ["quiz"], "files": ["quiz.yaml"]},
            {},
            {"stages.1.export": "none"},
            "evaluate needs an exported model",
        ),
        (
            {"tasks": ["quiz"], "files": ["quiz.yaml"], "starting_model": True},
            {},
            {},
            "starts from the last checkpoint of base, whose export is none",
        ),
        (
            {"tasks": ["quiz"], "files": ["quiz.yaml"], "starting_model": True},
            {},
            {"stages.1.from": None},
            "starts from random weights",
        ),
    ],
)
def test_evaluation_that_cannot_run_is_refused(
    tmp_path: Path, evaluate: dict[str, Any], task: dict[str, Any], config: dict[str, Any], message: str
):
    with pytest.raises(UserError, match=message):
        planned(tmp_path, evaluate, task, **config)


@pytest.mark.parametrize("joint", ["-", "_"])
def test_evaluations_whose_jobs_would_share_a_name_are_refused(tmp_path: Path, joint: str):
    """Both jobs would have the same folder or the same comment in Slurm."""
    longer, task = f"base{joint}trained", f"trained{joint}quiz"
    changes = {"stages.0.export": "last", "stages.0.evaluate": {"tasks": [task]}, "stages.1.name": longer}
    with pytest.raises(UserError, match=r"have the same job name evaluate.base.trained.trained.quiz") as refused:
        planned(tmp_path, {"tasks": ["quiz"]}, **changes)
    assert refused.value.hint == "give one of the two stages another name"
    planned(tmp_path, {"tasks": ["quiz"]}, **{**changes, "stages.1.name": "chat"})


@pytest.mark.parametrize(
    ("dataset", "files", "places"),
    [
        ("json", {"train": "hf://datasets/a/b/x.jsonl", "test": "hf://datasets/c/d/x.jsonl"}, "a/b@main and c/d@main"),
        ("json", ["hf://datasets/a/b/x.jsonl", "hf://datasets/a/b@v1/x.jsonl"], "a/b@main and a/b@v1"),
        ("json", ["quiz.jsonl", "hf://datasets/a/b/x.jsonl"], "a/b@main and this machine"),
        ("a/b", ["x.jsonl", "hf://datasets/c/d/x.jsonl"], "a/b@main and c/d@main"),
    ],
)
def test_data_of_several_repositories_are_refused_because_one_commit_is_pinned(
    tmp_path: Path, dataset: str, files: Any, places: str
):
    """The commit of the first repository was written into the addresses of all files."""
    task = {"dataset_path": dataset, "dataset_kwargs": {"data_files": files}}
    with pytest.raises(
        UserError, match=rf"quiz\.yaml: the data are in {places}, and one dataset has one commit"
    ) as refused:
        planned(tmp_path, {"tasks": ["quiz"], "files": ["quiz.yaml"]}, task)
    assert "write a task for each repository" in refused.value.hint


def test_data_of_one_repository_are_accepted_in_all_spellings(tmp_path: Path):
    files = {"train": "hf://datasets/a/b/x.jsonl", "test": ["hf://datasets/a/b@main/y.jsonl"]}
    for task in (
        {"dataset_kwargs": {"data_files": files}},
        {"dataset_path": "a/b", "dataset_kwargs": {"data_files": {**files, "more": "z.jsonl"}}},
        {"dataset_path": "a/b", "dataset_kwargs": {"revision": "v1"}},
    ):
        plan = planned(tmp_path, {"tasks": ["quiz"], "files": ["quiz.yaml"]}, task)
        assert tasks_to_fetch(plan.loaded, plan.stage("chat").stage) == ["quiz"]


def test_task_file_may_not_name_python_code(tmp_path: Path):
    (tmp_path / "code.yaml").write_text("task: quiz\ndataset_path: json\nprocess_docs: !function utils.f\n")
    with pytest.raises(UserError, match="tag !function is not allowed"):
        planned(tmp_path, {"tasks": ["quiz"], "files": ["code.yaml"]})


def test_every_task_of_every_model_is_a_job_that_waits_for_its_export(tmp_path: Path):
    evaluate = {"tasks": ["quiz", "arc_easy"], "files": ["quiz.yaml"], "starting_model": True, "gpus": 2, "minutes": 30}
    plan = planned(tmp_path, evaluate, **{"stages.0.export": "last"})
    jobs = job_kinds()["evaluate"].jobs(plan)
    assert jobs == [
        JobId("evaluate", ("chat", model, task)) for model in ("start", "trained") for task in ("quiz", "arc_easy")
    ]
    specs = {job.names[1]: job_spec(plan, job) for job in jobs}
    assert all(isinstance(found, EvaluateSpec) for found in specs.values())
    assert {model: getattr(found, "export", None) for model, found in specs.items()} == {
        "start": "results/small/export/base.json",
        "trained": "results/small/export/chat.json",
    }
    assert evaluation_inputs(plan, jobs[2]) == [
        Path("results/small/export/chat.json"),
        tmp_path / "quiz.yaml",
        Path("quiz.jsonl"),
    ]
    request = job_request(plan, jobs[0])
    assert (request.nodes, request.gpus_per_node, request.tasks, request.minutes) == (1, 2, 1, 30)
    assert evaluation_inputs(plan, jobs[3])[1:] == [Path("results/small/task_data/chat/arc_easy.json")]
    assert {Path(job_spec(plan, job).task_data or "local").stem for job in jobs} == {"local", "arc_easy"}  # type: ignore[attr-defined]


def test_names_of_lm_eval_with_dots_and_of_many_characters_are_tasks_whose_logs_stay(tmp_path: Path):
    """The longest name in lm_eval 0.4.13 has 86 characters."""
    tasks = ["longproc_countdown_0.5k", f"arabic_{'x' * 79}"]
    plan = planned(tmp_path, {"tasks": tasks})
    for job in job_kinds()["evaluate"].jobs(plan):
        write_text(plan.paths.attempt_logs(job).log(1), "text")
    assert tasks_to_fetch(plan.loaded, plan.stage("chat").stage) == tasks and not find_old_results(plan)


def test_a_task_of_the_user_changes_no_other_evaluation(tmp_path: Path):
    """Each evaluation reads the task file of its own task alone."""
    job, keys = JobId("evaluate", ("chat", "trained", "arc_easy")), []
    for more in ({}, {"files": ["quiz.yaml"]}):
        plan = planned(tmp_path, {"tasks": ["arc_easy", *(["quiz"] if more else [])], **more})
        keys.append((job_rerun_key(plan, job), evaluation_inputs(plan, job)))
    assert keys[0] == keys[1]


@pytest.mark.parametrize("written", ["a-{run}.jsonl", ["a-{run}.jsonl"], {"test": "a-{run}.jsonl"}])
def test_data_files_of_a_task_contain_the_name_of_the_run(tmp_path: Path, written: Any):
    (tmp_path / "a-small.jsonl").touch()
    task = {"dataset_kwargs": {"data_files": written}, "doc_to_text": "{run} {{question}}"}
    plan = planned(tmp_path, {"tasks": ["quiz"], "files": ["quiz.yaml"]}, task)
    spec = job_spec(plan, JobId("evaluate", ("chat", "trained", "quiz")))
    assert isinstance(spec, EvaluateSpec) and spec.own_task and spec.data_files == ("a-small.jsonl",)
    assert "small" in str(spec.own_task["dataset_kwargs"]) and spec.own_task["doc_to_text"] == "{run} {{question}}"


def test_local_task_needs_no_fetch(tmp_path: Path):
    files = {
        "datasets.prose": {"kind": "text", "files": ["prose.jsonl"]},
        "datasets.chats": {"kind": "chat", "files": ["c.jsonl"]},
    }
    (tmp_path / "prose.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "c.jsonl").write_text('{"messages": []}\n')
    assert not planned(tmp_path, {"tasks": ["quiz"], "files": ["quiz.yaml"]}, **files).needs_fetch


def test_a_changed_task_file_is_read_again(tmp_path: Path):
    for question in ("first", "second"):
        plan = planned(tmp_path, {"tasks": ["quiz"], "files": ["quiz.yaml"]}, {"doc_to_text": question})
        (file,) = read_task_files(plan.loaded, plan.stage("chat").stage)
        assert file.config["doc_to_text"] == question


def test_the_data_of_tasks_are_fetched_apart_from_everything_else(tmp_path: Path):
    """Another task changes neither what `fetch` reads nor the evaluations that exist."""
    local, job = {"tasks": ["quiz"], "files": ["quiz.yaml"]}, JobId("evaluate", ("chat", "trained", "quiz"))
    plans = [planned(tmp_path, {**local, "tasks": ["quiz", *more]}) for more in ([], ["arc_easy"], ["arc_hard"])]
    without = plan_of(tmp_path, {"stages.1.export": "last"})
    assert {fetch_key(plan) for plan in plans} == {fetch_key(without)}
    assert len({(job_rerun_key(plan, job), str(evaluation_inputs(plan, job))) for plan in plans}) == 1
    fetched = [tasks_to_fetch(plan.loaded, plan.stage("chat").stage) for plan in plans]
    assert fetched == [[], ["arc_easy"], ["arc_hard"]]


def test_task_data_are_pinned_again_for_other_data_and_not_for_another_prompt(tmp_path: Path):
    hub = {"dataset_path": "org/quiz", "dataset_kwargs": None}
    tasks = ({**hub, "doc_to_text": "a"}, {**hub, "doc_to_text": "b"}, {**hub, "dataset_name": "en"})
    plans = (planned(tmp_path, {"tasks": ["quiz"], "files": ["quiz.yaml"]}, task) for task in tasks)
    first, other_prompt, other_data = (task_data_key(plan, "chat", "quiz") for plan in plans)
    assert first == other_prompt != other_data


def test_the_keys_of_tasks_are_those_of_the_installed_lm_eval():
    from lm_eval.api.task import TaskConfig

    assert {field.name for field in dataclasses.fields(TaskConfig)} == TASK_KEYS


def test_the_allowed_metrics_are_those_of_the_installed_lm_eval():
    from lm_eval.api import metrics, registry

    assert metrics is not None  # its import fills the registries
    assert set(registry.metric_registry.keys()) == METRICS
    assert set(registry.aggregation_registry.keys()) == AGGREGATIONS
