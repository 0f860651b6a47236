"""vLLM serves one model on two hosts that reach each other through a network alone, started as a Slurm step starts it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.endpoint import Endpoint, read_endpoint
from longhaul.artifacts.paths import JobFolder
from longhaul.artifacts.serve_check_result import ServeCheckResult
from longhaul.config.site_serving_config import Serving
from longhaul.serving.api_key import create_key_file, read_key_file
from tests.serve.conftest import ENGINES, manifest_of
from tests.serve.serve_record import TWO_HOSTS, ServeRecord
from tests.serve.test_engines import vllm_bound
from tests.serve.test_serve_check import write_job
from tests.support.server_on_two_hosts import NODES, start_parts, write_server_spec
from tests.support.virtual_hosts import VirtualHosts, two_hosts
from tests.support.wait import wait_for

START_S = 300
# Without a compiled model, vLLM 0.32's CPU build leaves out the buffers for what a pipeline rank receives (AssertionError in
# sync_and_gather_intermediate_tensors). Mode 2 with the backend eager compiles nothing, and makes them.
OPTIONS = ('--compilation-config={"mode": 2, "backend": "eager"}',)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[VirtualHosts]:
    with two_hosts(tmp_path / "hosts") as hosts:
        yield hosts


SERVING = Serving(
    engine="vllm", python=(ENGINES["vllm"],), options=OPTIONS, environment={"VLLM_CPU_KVCACHE_SPACE": "1"}
)


def ask(hosts: VirtualHosts, endpoint: Endpoint, key: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask from the login node."""
    header = ["-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json"]
    return json.loads(hosts.run("curl", "-s", *header, "-d", json.dumps(body), f"{endpoint.url}/completions"))


@pytest.mark.timeout(600)
def test_two_hosts_serve_one_model(
    hosts: VirtualHosts,
    exports: dict[str, Path],
    prompts: Path,
    reference: dict[str, Any],
    tmp_path: Path,
    record: ServeRecord,
):
    folder = tmp_path / "job"
    folder.mkdir()
    create_key_file(folder / "api_key.yaml")
    spec = write_server_spec(folder, manifest_of(exports["llama"]), SERVING, START_S, drain_s=10)
    parts = start_parts(hosts, "serve", spec, 20017)

    def is_ready() -> bool:
        assert [part.poll() for part in parts] == [None, None], (folder / "n1.log").read_text()[-3000:]
        found = read_endpoint(JobFolder(folder).endpoint)
        return bool(found and found.ready)

    wait_for(is_ready, START_S)
    endpoint = read_endpoint(JobFolder(folder).endpoint)
    assert endpoint is not None
    assert endpoint.url.startswith(f"http://{hosts.address('n1')}:")
    assert "PP1" in (folder / "n2.log").read_text(), "the second host has the second half of the layers"
    largest = _largest_difference(hosts, folder, endpoint, prompts, reference)
    assert largest < vllm_bound("llama")
    hosts.run("kill", str(endpoint.owner.pid), host=NODES[0])
    assert [part.wait(timeout=60) for part in parts] == [0, 0], "the second host's part ends with the first one's"
    record.add_scores("llama", TWO_HOSTS, largest, vllm_bound("llama"))


def _largest_difference(
    hosts: VirtualHosts, folder: Path, endpoint: Endpoint, prompts: Path, reference: dict[str, Any]
) -> float:
    """Return the largest difference of log probabilities of three prompts from those of transformers."""
    key = read_key_file(folder / "api_key.yaml")
    differences: list[float] = []
    for ids, expected in list(zip(json.loads(prompts.read_text()), reference["llama"]["scores"], strict=True))[:3]:
        body = {"model": "small-main", "prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
        found = ask(hosts, endpoint, key, body)["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids)]
        differences += [abs(one - other) for one, other in zip(found, expected, strict=True)]
    return max(differences)


@pytest.mark.timeout(600)
def test_a_server_on_two_hosts_is_checked_from_the_first_one(
    hosts: VirtualHosts, exports: dict[str, Path], tmp_path: Path, record: ServeRecord
):
    folder = tmp_path / "job"
    folder.mkdir()
    spec = write_job(folder, exports["llama"], (1, 8), SERVING, nodes=2)
    parts = start_parts(hosts, "serve_check", spec, 20017)
    assert [part.wait(timeout=START_S + 200) for part in parts] == [0, 0], (folder / "n1.log").read_text()[-3000:]
    result = ServeCheckResult.read(folder / "result.json")
    assert (result.nodes, result.pipeline) == (2, 2)
    assert (result.agreement["largest_difference"] or 1.0) < vllm_bound("llama")
    assert "PP1" in (folder / "n2.log").read_text(), "the second host has the second half of the layers"
    record.add_check("llama", TWO_HOSTS, result, vllm_bound("llama"))
