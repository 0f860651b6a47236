"""Scores of an evaluation equal an independent count, and damaged or missing inputs are refused before the model is loaded."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from aiohttp import ContentTypeError
from lm_eval.tasks import manager
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from longhaul.artifacts.artifact_schemas import Export
from longhaul.artifacts.atomic_files import content_hash, file_sha256
from longhaul.artifacts.evaluation_result import EvaluationResult
from longhaul.artifacts.paths import JobId, RunPaths
from longhaul.artifacts.task_data_lock import PinnedDataset, TaskDataLock, dataset_request
from longhaul.config.serve_config import Serve
from longhaul.config.site_serving_config import Serving
from longhaul.errors import UserError
from longhaul.evaluation import evaluate_model
from longhaul.evaluation.evaluate_model import read_scores, run
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.evaluate_job import EvaluateSpec
from longhaul.planning.load_plan import DEMO, config_path, load_plan
from longhaul.serving import local_server
from longhaul.serving.link_server_nodes import NodeLink
from tests.support import bigram_vllm
from tests.support.small_configs import LLAMA
from tests.support.stage_folder import write_tokenizer

QUESTIONS = [
    {
        "question": f"What is {number}?",
        "choices": [f"an odd {number}", "even", "nothing at all", "one"],
        "label": number % 4,
    }
    for number in range(12)
]
TASK = {
    "task": "quiz",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of an export with random weights."""
    folder = tmp_path_factory.mktemp("export")
    write_tokenizer(folder / "model")
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA)).save_pretrained(folder / "model")
    files = {path.name: file_sha256(path) for path in (folder / "model").iterdir()}
    manifest = folder / "model.json"
    Export("base", "c", 1, str(folder / "model"), "fp32", 1, 1, files, {}, [], {}).write(manifest)
    return manifest


def spec(tmp_path: Path, exported: Path, keys: dict[str, Any] | None = None, **changes: Any) -> EvaluateSpec:
    """Return the spec of an evaluation on QUESTIONS. keys: replace those of TASK"""
    data = tmp_path / "quiz.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    local = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    values: dict[str, Any] = {
        "run": "small",
        "stage": "base",
        "model": "trained",
        "task": "quiz",
        "export": str(exported),
        "pretrained": None,
        "own_task": {**TASK, **local, **(keys or {})},
        "data_files": (str(data),),
        "task_data": None,
        "limit": None,
        "num_fewshot": 0,
        "batch_size": 5,
        "seed": 1,
        "chat": False,
        "gpus": 1,
        "serving": None,
        "serve": Serve(start_timeout_s=60),
        "dtype": "fp32",
        "nodes": 1,
        "tensor": 1,
        "pipeline": 1,
        "context_tokens": 128,
        "out": str(tmp_path / "quiz.json"),
    }
    return EvaluateSpec(**(values | changes))


def log_likelihood(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    """Return the sum of the log probabilities of the answer's tokens after the question."""
    before = tokenizer(question).input_ids
    ids = tokenizer(f"{question} {answer}").input_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(len(before), len(ids)))


def test_accuracy_and_standard_error_equal_an_independent_count(tmp_path: Path, exported: Path):
    job = spec(tmp_path, exported)
    run(job)
    folder = str(exported.with_suffix(""))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in QUESTIONS:
        values = [log_likelihood(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        right += values.index(max(values)) == row["label"]
    result = EvaluationResult.read(Path(job.out))
    (score,) = result.scores
    accuracy = right / len(QUESTIONS)
    error = (accuracy * (1 - accuracy) / (len(QUESTIONS) - 1)) ** 0.5
    assert score["value"] == pytest.approx(accuracy) and score["standard_error"] == pytest.approx(error)
    assert (score["task"], score["metric"], score["filter"]) == ("quiz", "acc", "none")
    assert score["documents"] == len(QUESTIONS) and score["higher_is_better"] is True
    assert result.settings["engine"] == "transformers" and result.data == []
    assert result.settings["chat_template_hash"] is None and result.weights and result.path == folder


@pytest.mark.parametrize(
    ("task", "metrics"), [("docstring_choice", {"acc", "acc_norm"}), ("docstring_answer", {"chrf"})]
)
def test_tasks_of_the_demo_give_their_scores(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, task: str, metrics: set[str]
):
    """In a copy of the demo's config with another run's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("multiprocessing.Pool", None)  # a fork of this process, which has threads, may never end
    copy = tmp_path / "mine.yaml"
    copy.write_text(config_path(Path(DEMO)).read_text().replace("run: demo", "run: mine"))
    planned = job_spec(load_plan(copy), JobId("evaluate", ("chat", "trained", task)))
    assert isinstance(planned, EvaluateSpec)
    data = RunPaths("mine").fetched / "docstrings-evaluation.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("".join(json.dumps(row | {"answer": "one"}) + "\n" for row in QUESTIONS))
    job = spec(tmp_path, exported, task=task, own_task=planned.own_task, limit=4, chat=True)
    run(job)
    scores = EvaluationResult.read(Path(job.out)).scores
    assert {score["metric"] for score in scores} == metrics and {score["documents"] for score in scores} == {4}


def test_fewer_documents_on_request(tmp_path: Path, exported: Path):
    job = spec(tmp_path, exported, limit=3)
    run(job)
    assert EvaluationResult.read(Path(job.out)).scores[0]["documents"] == 3


def test_pretrained_model_is_evaluated_without_recorded_hashes(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the environment of an outer launcher, by which accelerate would wait for other processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    job = spec(tmp_path, exported, export=None, pretrained=str(exported.with_suffix("")), model="start", limit=2)
    run(job)
    result = EvaluationResult.read(Path(job.out))
    assert (result.path, result.weights, result.model) == (job.pretrained, None, "start")


@pytest.mark.parametrize("requests", [1, 5])
def test_an_engine_that_serves_the_model_gives_the_scores(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, requests: int
):
    """The engine's log probabilities are those of a table of bigrams."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", ".cluster.example")
    python = (sys.executable, bigram_vllm.__file__)
    job = spec(tmp_path, exported, serving=Serving(engine="vllm", python=python), batch_size=requests)
    run(job)
    tokenizer = AutoTokenizer.from_pretrained(exported.with_suffix(""))

    def score(question: str, answer: str) -> float:
        before, ids = (
            [token % bigram_vllm.VOCABULARY for token in tokenizer(text).input_ids]
            for text in (question, f"{question} {answer}")
        )
        return sum(bigram_vllm.LOG_PROBABILITIES[ids[place - 1], ids[place]] for place in range(len(before), len(ids)))

    scores = [[score(row["question"], choice) for choice in row["choices"]] for row in QUESTIONS]
    right = sum(values.index(max(values)) == row["label"] for values, row in zip(scores, QUESTIONS, strict=True))
    result = EvaluationResult.read(Path(job.out))
    assert result.scores[0]["value"] == pytest.approx(right / len(QUESTIONS)) and right not in (0, len(QUESTIONS))
    assert result.settings["engine"] == "vllm 0.0"


def test_another_node_runs_its_part_of_the_engine_and_scores_nothing(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
):
    parts: list[str] = []
    monkeypatch.setattr(
        local_server,
        "run_until_first_node_ends",
        lambda server, link: parts.append(" ".join(server.command(link.rank, link.leader))),
    )
    with socket.socket() as connection:
        link = NodeLink(1, "10.0.0.1", "127.0.0.1", 20017, connection)
        monkeypatch.setattr(evaluate_model, "node_link", lambda nodes: nullcontext(link))
        run(spec(tmp_path, exported, serving=Serving(engine="vllm", python=("/vllm/python",)), nodes=2, pipeline=2))
    (part,) = parts
    assert "--pipeline-parallel-size 2" in part and "--dtype float32" in part
    assert "--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 20017 --headless" in part
    assert not (tmp_path / "quiz.json").exists()


def test_no_log_has_the_key_of_a_server_that_answers_wrongly(
    tmp_path: Path, exported: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    """lm_eval logs the headers of each request that fails."""
    serving = Serving(engine="vllm", python=(sys.executable, bigram_vllm.__file__), environment={"FAULT": "no_json"})
    with pytest.raises(ContentTypeError):
        run(spec(tmp_path, exported, serving=serving, limit=1))
    printed = caplog.text + "".join(capfd.readouterr())
    assert "Bearer [API key]" in printed and not re.search(r"\b[0-9a-f]{64}\b", printed)


def test_recorded_chat_template_is_the_one_that_the_prompts_have(tmp_path: Path, exported: Path):
    model = exported.with_suffix("")
    without = tmp_path / "without"
    shutil.copytree(model, without)
    (without / "chat_template.jinja").unlink()
    found = {}
    for folder in (model, without):
        job = spec(tmp_path, exported, export=None, pretrained=str(folder), model="start", limit=1, chat=True)
        run(job)
        found[folder] = EvaluationResult.read(Path(job.out)).settings["chat_template_hash"]
    assert found == {model: content_hash((model / "chat_template.jinja").read_text()), without: None}


def test_altered_export_is_refused(tmp_path: Path, exported: Path):
    export = Export.read(exported)
    other = tmp_path / "other.json"
    files = export.files | {"config.json": "0" * 64}
    Export("base", "c", 1, export.path, "fp32", 1, 1, files, {}, [], {}).write(other)
    with pytest.raises(UserError, match=r"config\.json does not have the hash"):
        run(spec(tmp_path, other))
    assert not (tmp_path / "quiz.json").exists()
    other.unlink()  # the remedy; the export rule writes it again
    export.write(other)
    run(spec(tmp_path, other))
    assert (tmp_path / "quiz.json").exists()


def write_questions(folder: Path) -> None:
    """Write five questions as fetch stores a dataset."""
    datasets.DatasetDict({"test": datasets.Dataset.from_list(QUESTIONS[:5])}).save_to_disk(str(folder))


def write_lock(folder: Path, name: str | None, stored: Path, files: dict[str, str]) -> str:
    """Write the lock of a task that loads a configuration of org/quiz."""
    request, lock = dataset_request("org/quiz", name, {}), folder / "lock.json"
    TaskDataLock([PinnedDataset(request=request, revision="r", path=str(stored), files=files)]).write(lock)
    return str(lock)


def test_data_of_the_hub_come_from_what_fetch_stored(tmp_path: Path, exported: Path):
    stored = tmp_path / "stored"
    write_questions(stored)
    files = {str(path.relative_to(stored)): file_sha256(path) for path in stored.rglob("*") if path.is_file()}
    lock = write_lock(tmp_path, "en", stored, files)
    on_the_hub = {"dataset_path": "org/quiz", "dataset_name": "en", "dataset_kwargs": {}}
    job = spec(tmp_path, exported, on_the_hub, task_data=lock)
    run(job)
    result = EvaluationResult.read(Path(job.out))
    assert (result.scores[0]["documents"], result.data) == (5, ["org/quiz@r"])
    with pytest.raises(UserError, match=r"org/quiz, configuration de, of the task is not in the lock of its data"):
        run(spec(tmp_path, exported, {**on_the_hub, "dataset_name": "de"}, task_data=lock))
    fetched = write_lock(tmp_path, "de", stored, files)
    run(spec(tmp_path, exported, {**on_the_hub, "dataset_name": "de"}, task_data=fetched))
    lock = write_lock(tmp_path, "en", stored, files)
    shard = next(stored.glob("test/*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(UserError, match="does not have the hash") as failed:
        run(job)
    assert f"rm -r {stored}" in failed.value.hint
    shutil.rmtree(stored)
    write_questions(stored)  # as fetch does it
    run(job)


def test_pinned_data_stay_as_they_are_where_the_code_of_a_task_transforms_them(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
):
    """`datasets` writes what Dataset.map returns beside the data, which may lie where the job cannot write."""
    tasks, stored = tmp_path / "lm_eval_tasks", tmp_path / "stored"
    tasks.mkdir()
    keys = yaml.safe_dump({**TASK, "task": "mapped", "dataset_path": "org/quiz", "process_docs": "utils.shout"})
    (tasks / "mapped.yaml").write_text(keys.replace("process_docs: ", "process_docs: !function "))
    (tasks / "utils.py").write_text(
        "def shout(rows):\n    return rows.map(lambda row: {'question': row['question'].upper()})\n"
    )
    monkeypatch.setattr(manager, "__file__", str(tasks / "manager.py"))
    write_questions(stored)
    folders = [stored, *(path for path in stored.rglob("*") if path.is_dir())]
    files = {str(path.relative_to(stored)): file_sha256(path) for path in stored.rglob("*") if path.is_file()}
    lock = write_lock(tmp_path, None, stored, files)
    job = spec(tmp_path, exported, task="mapped", own_task=None, task_data=lock)
    for folder in folders:
        folder.chmod(0o555)
    run(job)
    for folder in folders:
        folder.chmod(0o755)
    assert EvaluationResult.read(Path(job.out)).scores[0]["documents"] == 5
    assert {str(path.relative_to(stored)) for path in stored.rglob("*") if path.is_file()} == files.keys()


@pytest.mark.slow  # lm_eval reads its 14,000 task files to find a name
def test_unknown_task_is_named(tmp_path: Path, exported: Path):
    job = spec(tmp_path, exported, task="quizz", own_task=None)
    with pytest.raises(UserError, match="has no task or group 'quizz'"):
        run(job)


def test_scores_of_groups_and_without_standard_error_are_read():
    results = {
        "results": {"a": {"alias": "a", "chrf,none": 12.5, "chrf_stderr,none": "N/A"}},
        "groups": {"g": {"acc,strict": 0.5, "acc_stderr,strict": 0.1}},
        "n-samples": {"a": {"original": 9, "effective": 4}},
        "higher_is_better": {"a": {"chrf": True}},
    }
    keys = ("task", "metric", "filter", "value", "standard_error", "higher_is_better", "documents")
    assert read_scores(results) == [
        dict(zip(keys, ("a", "chrf", "none", 12.5, None, True, 4), strict=True)),
        dict(zip(keys, ("g", "acc", "strict", 0.5, 0.1, None, 0), strict=True)),
    ]
