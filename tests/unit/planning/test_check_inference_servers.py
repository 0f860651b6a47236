"""The plan refuses server checks and served evaluations that cannot work, and plans the jobs of the others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.paths import JobId
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_kinds, job_request, job_rerun_key, job_spec
from longhaul.jobs.kinds.evaluate_job import EvaluateSpec
from longhaul.jobs.kinds.serve_check_job import ServeCheckSpec
from longhaul.jobs.launch_files import render_job
from longhaul.planning import Plan
from tests.support.small_configs import plan_of

CHECK = {"stages.1.export": "last", "stages.1.serve_check": {"streams": [1, 4], "answer_tokens": 16, "minutes": 20}}
TWO_HEADS = {"model.llama.num_attention_heads": 2, "stages.1.serve": {"context": 100, "gpus_per_node": 4}}
VLLM = {"engine": "vllm", "python": [sys.executable]}


def planned(folder: Path, site: dict[str, Any], **config: Any) -> Plan:
    return plan_of(folder, {**CHECK, **config}, site)


def test_the_job_of_a_check(tmp_path: Path):
    plan = planned(tmp_path, {"serving": VLLM}, **{"stages.1.serve": {"context": 100, "gpus_per_node": 2}})
    job = JobId("serve_check", ("chat",))
    assert job_kinds()["serve_check"].jobs(plan) == [job]
    spec = job_spec(plan, job)
    assert isinstance(spec, ServeCheckSpec)
    assert (spec.tensor, spec.context_tokens, spec.dtype) == (2, 100, "bf16")
    assert spec.out == "results/small/serve_check/chat.json"
    request = job_request(plan, job)
    assert (request.nodes, request.gpus_per_node, request.minutes) == (1, 2, 20)


def test_a_check_has_the_pipeline_ranks_of_the_server(tmp_path: Path):
    """A layer of 2 heads cannot be spread over 4 GPUs."""
    spec = job_spec(planned(tmp_path, {"serving": VLLM}, **TWO_HEADS), JobId("serve_check", ("chat",)))
    assert isinstance(spec, ServeCheckSpec)
    assert (spec.tensor, spec.pipeline) == (2, 2)


@pytest.mark.parametrize(
    "job", [JobId("serve_check", ("chat",)), JobId("evaluate", ("chat", "trained", "arc_easy"))], ids=str
)
def test_a_server_of_a_job_has_the_nodes_of_the_section_serve(tmp_path: Path, job: JobId):
    serve = {"stages.1.serve": {"nodes": 2, "gpus_per_node": 2}, "stages.1.evaluate": EVALUATE}
    plan = planned(tmp_path, {"serving": VLLM}, **serve)
    spec, request = job_spec(plan, job), job_request(plan, job)
    assert isinstance(spec, ServeCheckSpec | EvaluateSpec)
    assert (spec.nodes, spec.tensor, spec.pipeline) == (2, 2, 2)
    assert (request.nodes, request.tasks, request.gpus_per_node) == (2, 2, 2)
    command = render_job(plan, job, tmp_path).files["launch.json"]
    assert all(option in command for option in ("--nodes=2", "--ntasks=2", "--gpus-per-node=2"))


def test_an_evaluation_without_a_server_has_one_node(tmp_path: Path):
    serve = {"stages.1.serve": {"nodes": 2, "gpus_per_node": 2}, "stages.1.evaluate": {"tasks": ["arc_easy"]}}
    plan, job = planned(tmp_path, {"serving": VLLM}, **serve), JobId("evaluate", ("chat", "trained", "arc_easy"))
    spec = job_spec(plan, job)
    assert isinstance(spec, EvaluateSpec) and spec.nodes == job_request(plan, job).nodes == 1


def test_the_check_of_an_engine_with_its_own_python_runs_outside_of_the_jobs_container(tmp_path: Path):
    container = {"software": {"kind": "container", "path": "/images/job.sif"}}
    kind = job_kinds()["serve_check"]
    for name, serving, outside in (
        ("a", VLLM, True),
        ("b", {"engine": "vllm"}, False),
        ("c", {**VLLM, "engine": "transformers"}, False),
    ):
        plan = planned(tmp_path / name, {**container, "serving": serving})
        command = render_job(plan, JobId("serve_check", ("chat",)), tmp_path).files["launch.json"]
        assert kind.outside_environment(plan) is outside
        assert ("apptainer" in command) is not outside


def test_another_engine_checks_again_and_another_time_limit_does_not(tmp_path: Path):
    job = JobId("serve_check", ("chat",))
    keys = {
        name: job_rerun_key(planned(tmp_path / name, {"serving": {**VLLM, "options": options}}), job)
        for name, options in (("a", []), ("b", []), ("c", ["--enforce-eager"]))
    }
    assert keys["a"] == keys["b"] != keys["c"]


@pytest.mark.parametrize(
    ("config", "site", "message"),
    [
        ({"stages.1.export": "none"}, {"serving": VLLM}, "serve_check needs an exported model"),
        (
            {"stages.1.serve_check": {"answer_tokens": 97}},
            {"serving": VLLM},
            "with a prompt of 32 tokens this is longer than the server's context of 128 tokens",
        ),
        (
            {"stages.1.serve": {"context": 4096}},
            {"serving": VLLM},
            "longer than the model's max_position_embeddings 128",
        ),
        (
            {"stages.1.serve_check": {"streams": [8, 1]}},
            {"serving": VLLM},
            r"streams \[8, 1\]: the numbers must increase",
        ),
        ({"stages.1.serve_check": {"streams": [65]}}, {"serving": VLLM}, "at most 64|less than or equal to 64"),
    ],
)
def test_a_check_that_cannot_run_is_refused(tmp_path: Path, config: dict[str, Any], site: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        planned(tmp_path, site, **config)


EVALUATE = {"tasks": ["arc_easy"], "engine": "server"}


def evaluated(folder: Path, site: dict[str, Any], **config: Any) -> Plan:
    return plan_of(folder, {"stages.1.export": "last", "stages.1.evaluate": EVALUATE, **config}, site)


def test_a_served_evaluation_has_the_gpus_and_the_layout_of_the_server(tmp_path: Path):
    serve = {"context": 100, "gpus_per_node": 2, "max_running_requests": 8}
    plan = evaluated(tmp_path, {"serving": VLLM}, **{"stages.1.serve": serve})
    job = JobId("evaluate", ("chat", "trained", "arc_easy"))
    spec = job_spec(plan, job)
    assert isinstance(spec, EvaluateSpec) and spec.serving and spec.serving.engine == "vllm"
    assert (spec.tensor, spec.pipeline, spec.context_tokens, spec.dtype) == (2, 1, 100, "bf16")
    assert spec.serve.max_running_requests == 8 and job_request(plan, job).gpus_per_node == 2


def test_another_engine_of_the_site_evaluates_again_only_what_it_serves(tmp_path: Path):
    job = JobId("evaluate", ("chat", "trained", "arc_easy"))
    keys = {
        (engine, options): job_rerun_key(
            evaluated(
                tmp_path / f"{engine}{len(options)}",
                {"serving": {**VLLM, "options": list(options)}},
                **{"stages.1.evaluate": {"tasks": ["arc_easy"], "engine": engine}},
            ),
            job,
        )
        for engine in ("transformers", "server")
        for options in ((), ("--enforce-eager",))
    }
    same, other = (
        [keys[engine, options] for options in ((), ("--enforce-eager",))] for engine in ("transformers", "server")
    )
    assert same[0] == same[1] and other[0] != other[1]


@pytest.mark.parametrize(
    ("config", "site", "message"),
    [
        ({}, {}, r"stages\.chat\.evaluate\.engine is server, and serving\.engine of site centre is transformers"),
        ({}, {"serving": {"engine": "sglang"}}, r"serving\.engine sglang needs the package sglang"),
        (
            {},
            {"serving": VLLM, "software": {"kind": "container", "path": "/images/job.sif"}},
            r"inside of the job environment's container, .* cannot be started",
        ),
        (
            {"stages.1.evaluate": {**EVALUATE, "gpus": 2}},
            {"serving": VLLM},
            "gpus has no effect with engine server: set serve.gpus_per_node",
        ),
    ],
)
def test_a_served_evaluation_that_cannot_run_is_refused(
    tmp_path: Path, config: dict[str, Any], site: dict[str, Any], message: str
):
    with pytest.raises(UserError, match=message):
        evaluated(tmp_path, site, **config)
