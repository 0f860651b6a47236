"""The check with the real `transformers serve`, and a client of the package openai."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import psutil
import pytest

from longhaul.artifacts.artifact_schemas import Export
from longhaul.artifacts.serve_check_result import ServeCheckResult
from longhaul.config.serve_check_config import ServeCheck
from longhaul.config.serve_config import Serve
from longhaul.config.site_serving_config import Serving
from longhaul.jobs.kinds.serve_check_job import ServeCheckSpec
from longhaul.serving.check_server import run
from longhaul.serving.engines import LOOPBACK, Server
from longhaul.serving.server_process import free_port, running_server
from tests.support.served_export import PROMPTS, write_llama_export
from tests.support.wait import wait_for_end


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_export(tmp_path_factory.mktemp("served"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)


def job_of(manifest: Path, out: Path) -> ServeCheckSpec:
    return ServeCheckSpec(
        run="unit",
        stage="main",
        export=str(manifest),
        dtype="fp32",
        serving=Serving(),
        serve=Serve(),
        check=ServeCheck(streams=(1, 6), answer_tokens=8, start_timeout_s=120.0),
        nodes=1,
        tensor=1,
        pipeline=1,
        context_tokens=128,
        out=str(out),
    )


@pytest.mark.usefixtures("no_new_process")
def test_a_served_export_gives_its_greedy_text_to_the_check_and_to_a_client_of_openai(manifest: Path, tmp_path: Path):
    run(job_of(manifest, tmp_path / "result.json"))
    result = ServeCheckResult.read(tmp_path / "result.json")
    assert (result.engine, result.agreement["compared"], result.agreement["same_text"]) == ("transformers", 3, 1.0)
    assert [(step["streams"], step["tokens"]) for step in result.load] == [(1, 8), (6, 48)]
    assert result.distinct_answers == 6
    assert len(result.listens_at) == 1
    assert result.listens_at[0].startswith("127.0.0.1:")


def test_a_client_of_openai_gets_the_greedy_text_and_a_chat_and_no_log_has_them(
    manifest: Path, capfd: pytest.CaptureFixture[str]
):
    export, marker = Export.read(manifest), "a-text-that-no-log-may-hold"
    server = Server(Serving(), Path(export.path), "main", "fp32", LOOPBACK, free_port(LOOPBACK))
    with running_server(server, None, 120):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
        model = server.requested_model
        found = client.completions.create(model=model, prompt=PROMPTS[0], max_tokens=8, temperature=0)
        text = found.choices[0].text.rstrip("\ufffd")
        assert export.samples[0]["completion"].startswith(text)
        question = [{"role": "user", "content": marker}]
        chat = client.chat.completions.create(model=model, messages=question, max_tokens=4)  # pyright: ignore
        assert chat.choices[0].finish_reason == "length"
        with pytest.raises(openai.APIStatusError):
            client.completions.create(model="another", prompt=marker, max_tokens=4)
        with pytest.raises(openai.APIStatusError):
            client.post("/chat/completions", body={"model": model, "messages": marker}, cast_to=object)
    printed = "".join(capfd.readouterr())
    assert len(text) > 4 and "/v1/completions" in printed, "the server prints into what is searched"
    assert not [text for text in (marker, PROMPTS[0], text) if text in printed]


def test_no_process_is_left_when_the_check_is_killed_while_the_server_starts(manifest: Path, tmp_path: Path):
    spec = tmp_path / "job.json"
    job_of(manifest, tmp_path / "result.json").write(spec)
    process = subprocess.Popen([sys.executable, "-m", "longhaul", "job", "run", "serve_check", str(spec)])
    found: list[psutil.Process] = []
    end = time.monotonic() + 60
    while time.monotonic() < end and len(found) < 2:
        time.sleep(0.2)
        found = psutil.Process(process.pid).children(recursive=True)
    assert len(found) == 2  # the guardian and the server
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for_end(found)
