"""The demo with profiles/slurm on two nodes with two processes each, in a container without a Slurm client."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from longhaul.config.site_serving_config import Serving
from longhaul.serving.engines import LOOPBACK, Server
from longhaul.serving.server_process import free_port, running_server
from tests.support.pipeline_run import REPOSITORY, PipelineRun, leaks, local_site, write_site
from tests.support.pipeline_run_on_cluster import SITE, PipelineRunOnCluster, fake_image
from tests.support.virtual_cluster import VirtualCluster
from tests.support.wait import wait_for

HOSTS = {"n1", "n2"}
QUICK_STEPS = 24
STATUS_EVERY_S = 6.0
COMPARED_STEPS = 12
"""Enough steps to show a difference in routing, clipping or Adam. All 240 would take minutes."""


class WatchedChain(PipelineRunOnCluster):
    """A run with what its main process printed, and its status at many moments."""

    output: str
    statuses: list[dict[str, Any]]


class StatusWatcher(threading.Thread):
    """Asks `longhaul status` on the login node every few seconds, as a user does in a second terminal."""

    def __init__(self, chain: PipelineRunOnCluster) -> None:
        super().__init__(daemon=True)
        self._chain, self._is_over = chain, threading.Event()
        self._found: list[dict[str, Any]] = []
        self._failures: list[AssertionError] = []

    def run(self) -> None:
        while not self._is_over.wait(STATUS_EVERY_S):
            if self._found or (self._chain.results / "plan.json").exists():
                try:
                    self._found.append(self._ask())
                except AssertionError as failure:
                    self._failures.append(failure)

    def stop(self) -> None:
        self._is_over.set()
        self.join(60)

    def answers(self) -> list[dict[str, Any]]:
        """Return all answers, and that after the end of the run."""
        if self._failures:
            raise self._failures[0]
        return [*self._found, self._ask()]

    def _ask(self) -> dict[str, Any]:
        words = [sys.executable, "-m", "longhaul", "status", str(self._chain.results), "--json"]
        command = self._chain.cluster.command(words, cwd=self._chain.folder)
        environment = self._chain.environment()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def demo(
    cluster: VirtualCluster, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> WatchedChain:
    """The finished demo. Its site and the number of nodes and processes differ from the shipped config.

    `make test` also trains fewer steps, `make test-all` all of them.
    """
    folder = tmp_path_factory.mktemp("demo")
    config = yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text())
    config["site"], config["checks"]["nodes"] = "./site.yaml", 2
    for stage in config["stages"]:
        stage.update(nodes=2, gpus_per_node=2, micro_batch_size=2)
    if not pytestconfig.getoption("all"):
        for stage, steps in zip(config["stages"], (QUICK_STEPS, QUICK_STEPS // 2), strict=True):
            stage["steps"] = stage["checkpoints"]["every_steps"] = stage["validation"]["every_steps"] = steps
    chain = WatchedChain(folder, config, cluster, software={"kind": "container", "path": str(fake_image(folder))})
    watcher = StatusWatcher(chain)
    watcher.start()
    try:
        chain.output = chain.run(timeout_s=580)
    finally:
        watcher.stop()
    chain.statuses = watcher.answers()
    return chain


def validation_losses(demo: PipelineRunOnCluster, stage: str) -> list[float]:
    lines = (demo.weights(stage) / "metrics.jsonl").read_text().splitlines()
    return [row["validation_loss"] for row in map(json.loads, lines) if "validation_loss" in row]


@pytest.mark.timeout(700)
def test_status_follows_the_run_with_slurms_job_ids(demo: WatchedChain):
    """While a stage trains, its steps and its job in the queue are shown; no answer ever names a failure."""
    training = [
        stage
        for status in demo.statuses
        for stage in status["stages"]
        if stage["job"]["state"] == "running" and stage["progress"] and stage["progress"]["step"]
    ]
    assert training and all(stage["job"]["slurm_job_id"] and "n1, n2" in stage["job"]["detail"] for stage in training)
    assert all(0 < stage["progress"]["step"] <= stage["steps"] for stage in training)
    assert {status["queue_problem"] for status in demo.statuses} == {""}
    # All jobs are done when the main process still writes the report.
    assert {status["state"] for status in demo.statuses[:-1]} <= {"running", "queued", "done"}
    last = demo.statuses[-1]
    assert last["state"] == "done" and last["main_process"] is None
    assert all(stage["progress"]["step"] == stage["steps"] for stage in last["stages"])


def test_main_process_prints_events_and_the_summary(demo: WatchedChain):
    """Its values are those of `longhaul status`; Snakemake's own messages are in its log file alone."""
    progress = demo.statuses[-1]["stages"][1]["progress"]
    for expected in (
        "train-pretrain submitted (train one stage), log: results/demo/logs/train/pretrain.log",
        "train-pretrain done after ",
        "Run demo: done after ",
        f"loss {progress['first_loss']:.3f} → {progress['loss']:.3f}",
        f"Model of chat, verified: {demo.results / 'export' / 'chat'}",
        f"Report: {demo.results / 'report.html'}",
    ):
        assert expected in demo.output, demo.output
    assert "Shell command" not in demo.output and "reason:" not in demo.output
    (log,) = (demo.folder / ".snakemake" / "log").glob("*.snakemake.log")
    assert "reason: Missing output files" in log.read_text() and "longhaul-demo_" in log.read_text()


@pytest.mark.timeout(700)
def test_both_nodes_are_used(demo: PipelineRunOnCluster):
    assert {node["host"] for node in demo.read("environment.json")["nodes"]} == HOSTS
    assert set(demo.read("fabric.json")["hosts"]) == HOSTS and demo.read("fabric.json")["world_size"] == 4
    for stage in ("pretrain", "chat"):
        attempt = json.loads((demo.weights(stage) / "attempts.jsonl").read_text())
        assert set(attempt["hosts"]) == HOSTS and attempt["world_size"] == 4
    assert "n1, n2" in (demo.results / "report.html").read_text()


def training_losses(weights: Path) -> list[float]:
    """Return the losses of the first COMPARED_STEPS steps that are done. The last line may be incomplete."""
    path = weights / "metrics.jsonl"
    rows = (json.loads(line) for line in path.open() if line.endswith("\n")) if path.exists() else ()
    return list(islice((row["loss"] for row in rows if "loss" in row), COMPARED_STEPS))


@pytest.fixture(scope="module")
def local_run(demo: PipelineRun, tmp_path_factory: pytest.TempPathFactory) -> PipelineRun:
    """The demo's data and tokenizer in another folder, with its first stage rendered for 4 ranks on this machine."""
    config = json.loads(json.dumps(demo.config))
    config["checks"]["nodes"] = 1
    for stage in config["stages"]:
        stage.update(nodes=1, gpus_per_node=4)
    local_run = PipelineRun(tmp_path_factory.mktemp("local"), config)
    shutil.copytree(demo.folder / "results", local_run.folder / "results", ignore=shutil.ignore_patterns("stages"))
    # As many threads per rank as on the cluster: here one node has twice as many ranks.
    site = local_site()
    site["partitions"][0]["node"]["cpus"] = 2 * SITE["partitions"][0]["node"]["cpus"]
    write_site(local_run.folder, site)
    command = [sys.executable, "-m", "longhaul", "job", "render", str(local_run.folder / "run.yaml")]
    subprocess.run(command, cwd=local_run.folder, check=True, env=local_run.environment())
    return local_run


def test_losses_equal_those_of_the_same_world_size_on_one_machine(demo: PipelineRun, local_run: PipelineRun):
    weights = local_run.results / "stages/pretrain/weights" / demo.weights("pretrain").name
    command, log = ["bash", str(local_run.results / "stages/pretrain/launch.sh")], local_run.folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=local_run.folder, stdout=stream, stderr=stream, env=local_run.environment()
        )
        try:
            wait_for(lambda: len(training_losses(weights)) == COMPARED_STEPS or process.poll() is not None, 240)
        finally:
            process.terminate()  # the supervisor forwards the signal, and the training saves and exits
            process.wait(60)
    assert training_losses(weights) == pytest.approx(training_losses(demo.weights("pretrain")), rel=1e-6), (
        log.read_text()
    )


def test_no_secret_is_written(demo: PipelineRunOnCluster):
    assert leaks(demo.folder) == []


def test_validation_loss_falls(demo: PipelineRunOnCluster):
    for stage in ("pretrain", "chat"):
        before, *_, after = validation_losses(demo, stage)
        assert after < before - 0.3, stage


@pytest.mark.slow
def test_validation_loss_falls_below_the_entropy_of_the_token_frequencies(demo: PipelineRunOnCluster):
    entropy = demo.read("data/stdlib.json")["unigram_entropy_nats"]
    assert validation_losses(demo, "pretrain")[-1] < entropy - 1.0
    before, *_, after = validation_losses(demo, "chat")
    assert after < before - 0.5


def test_export_is_verified_and_loads(demo: PipelineRunOnCluster):
    from transformers import AutoModelForCausalLM

    export = demo.read("export/chat.json")
    assert export["verification"]["logits"]["bit_equal"]
    assert export["verification"]["tensors"]["equal"] == export["verification"]["tensors"]["count"]
    assert AutoModelForCausalLM.from_pretrained(demo.folder / export["path"]).config.model_type == "deepseek_v3"


def test_export_is_served_to_a_client_of_openai(demo: PipelineRunOnCluster):
    """The answer to a chat is what transformers generates for the same messages."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo.folder / demo.read("export/chat.json")["path"]
    messages = [{"role": "user", "content": "What does os.path.join do?"}]
    server = Server(Serving(), folder, "chat", "fp32", LOOPBACK, free_port(LOOPBACK))
    with running_server(server, None, 120):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
        asked: Any = client.chat.completions.create
        answer = asked(model=server.requested_model, messages=messages, max_tokens=12, temperature=0).choices[0].message
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer.content.rstrip("\ufffd") in tokenizer.decode(expected, skip_special_tokens=True)
    assert len(answer.content) > 5


@pytest.mark.parametrize(("task", "metric"), [("docstring_choice", "acc"), ("docstring_answer", "chrf")])
def test_export_is_evaluated_and_its_score_is_in_the_report(demo: PipelineRunOnCluster, task: str, metric: str):
    result = demo.read(f"evaluation/chat/trained/{task}.json")
    (score,) = [score for score in result["scores"] if score["metric"] == metric]
    assert result["path"] == demo.read("export/chat.json")["path"] and result["settings"]["chat_template_hash"]
    assert (
        score["value"] > 0 and score["standard_error"] > 0 and score["documents"] == result["settings"]["limit"] == 100
    )
    cells = ("chat", task, metric, "100", "–", f"{score['value']:.4g} ± {score['standard_error']:.2g}")
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    assert row in (demo.results / "report.html").read_text()


@pytest.mark.slow
def test_export_answers_and_ends_with_eos(demo: PipelineRunOnCluster):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = demo.read("export/chat.json")
    folder = demo.folder / export["path"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": "What does os.path.join do?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=96, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert all(sample["ended_with_eos"] for sample in export["samples"])


def test_jobs_in_the_container_have_no_slurm_client(demo: PipelineRunOnCluster, tmp_path: Path):
    """The stand-in for Apptainer hides the client. The supervisor talks to Slurm outside the container."""
    steps = demo.read("stages/chat/launch.json")["steps"]
    assert all({"srun", "apptainer"} <= set(step["command"]) for step in steps)
    printed = demo.cluster.run(
        "env",
        f"PATH={demo.environment()['PATH']}",
        "apptainer",
        "exec",
        str(demo.folder / "job.sif"),
        "scontrol",
        "ping",
        check=False,
    )
    assert printed == ""
