"""`longhaul serve` of the demo in vLLM: who may ask, where it listens, what it logs, that it drains and leaves no process."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from longhaul.artifacts.endpoint import Endpoint
from tests.serve.serve_record import ServeRecord
from tests.serve.test_serve_check import DEMO_SERVING
from tests.support.run_with_fake_engine import KEY, LOCAL_SITE, ServedRun, answer, listening_addresses
from tests.support.wait import wait_for

START_S = 300
REQUESTS = 24
"""Each asks for 100 tokens. The server computes at most 8 requests at a time, so the last answer comes seconds later."""
MARKER = "a-text-that-no-log-may-hold"
CHAT = [{"role": "user", "content": "What does os.path.join do?"}]


def complete(url: str, prompt: Any, tokens: int) -> int:
    """Return the number of tokens that the server writes for a prompt, a text or token ids."""
    body = {"model": "small-base", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())["usage"]["completion_tokens"]


def chat(endpoint: Endpoint) -> str:
    """Return the answer to CHAT, asked as the how-to page says."""
    client = OpenAI(base_url=endpoint.url, api_key=KEY)
    messages: Any = CHAT
    asked = client.chat.completions.create(model=endpoint.model, messages=messages, max_tokens=24, temperature=0)
    return asked.choices[0].message.content or ""


def answer_of_transformers(export: Path) -> str:
    """Return what transformers answers to CHAT with at most 24 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    model: Any = AutoModelForCausalLM.from_pretrained(export)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.fixture
def run(demo: Path, tmp_path: Path) -> Iterator[ServedRun]:
    serve = {"drain_s": 60, "concurrency": 2, "max_running_requests": 8}
    served = ServedRun(tmp_path.resolve(), serve, {**LOCAL_SITE, "serving": DEMO_SERVING.model_dump(mode="json")})
    served.write_export(demo.resolve())
    yield served
    for process in served.processes():
        process.kill()


def logged(run: ServedRun) -> str:
    return "".join(path.read_text() for path in (run.folder / "results/small/logs").rglob("*.log"))


@pytest.mark.timeout(900)
def test_vllm_asks_for_the_key_drains_and_leaves_no_process(run: ServedRun, demo: Path, record: ServeRecord):
    run.start_verb()
    endpoint = run.wait_until_ready(START_S)
    assert [answer(f"{endpoint.url}/models", key) for key in (None, "wrong", KEY)] == [401, 401, 200]
    server = endpoint.url.removesuffix("/v1")
    paths = ("invocations", "tokenize", "metrics", "version", "load", "docs", "no-such-path")
    assert {answer(f"{server}/{path}", None) for path in paths} == {401}
    assert [answer(f"{server}/health"), answer(f"{server}/metrics", KEY)] == [200, 200]
    assert listening_addresses(run.processes()) == {"127.0.0.1"}
    assert not [process for process in run.processes() if KEY in " ".join(process.cmdline())]
    assert complete(endpoint.url, MARKER, 4) == 4
    expected = answer_of_transformers(demo)
    assert chat(endpoint).strip() == expected and expected
    _kill_a_client_with_a_running_request(endpoint.url)
    with ThreadPoolExecutor(REQUESTS) as pool:
        asked = [pool.submit(complete, endpoint.url, [5, 6, 7, number], 100) for number in range(REQUESTS)]
        wait_for(lambda: metric(endpoint.url, "vllm:num_requests_running"))
        assert run.call("--stop").returncode == 0
        assert [request.result() for request in asked] == [100] * REQUESTS, "accepted requests are answered"
    wait_for(lambda: not run.processes())
    assert "max_num_seqs" in logged(run) and KEY not in logged(run) and MARKER not in logged(run)
    record.add_end("longhaul serve, kill -9 of a client", "its request ended, the next one was answered")
    record.add_end("longhaul serve --stop", f"{REQUESTS} of {REQUESTS} accepted requests answered, no process left")


def _kill_a_client_with_a_running_request(url: str) -> None:
    """Check that the server ends the request of a killed client, and answers others."""
    tokens, before = 110, metric(url, "vllm:generation_tokens_total")
    body = json.dumps(
        {"model": "small-base", "prompt": [9, 8, 7], "max_tokens": tokens, "stream": True, "ignore_eos": True}
    )
    headers = ("-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json")
    command = ["curl", "-s", "-N", *headers, "-d", body, f"{url}/completions"]
    client = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline().startswith(b"data: "), "the first token came"
    client.kill()
    client.wait()
    wait_for(lambda: not metric(url, "vllm:num_requests_running"))
    assert metric(url, "vllm:generation_tokens_total") - before < tokens, "the request was not computed to its end"
    assert complete(url, [9, 8, 7], 4) == 4


def metric(url: str, name: str) -> float:
    """Return the value of one of vLLM's metrics."""
    metrics = urllib.request.Request(f"{url.removesuffix('/v1')}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(metrics, timeout=30) as response:
        lines = response.read().decode().splitlines()
    (value,) = [line.split()[-1] for line in lines if line.startswith(f"{name}{{")]
    return float(value)


@pytest.mark.timeout(900)
def test_no_process_of_vllm_is_left_after_kill_9_of_the_supervisor(run: ServedRun, record: ServeRecord):
    run.start_verb()
    run.wait_until_ready(START_S)
    assert run.process is not None and len(run.processes()) > 4
    run.process.kill()
    killed = time.monotonic()
    wait_for(lambda: not run.processes(), 120)
    seconds = time.monotonic() - killed
    record.add_end("longhaul serve, kill -9 of the supervisor", f"no process left after {seconds:.1f} s")
