"""vLLM serves one model on two hosts that reach each other through a network alone, started as a Slurm step starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.endpoint import Endpoint, read_endpoint
from longhaul.artifacts.paths import JobFolder
from longhaul.config.serving_config import Serving
from longhaul.jobs.kinds.serve_job import ServeSpec
from longhaul.serving.api_key import create_key_file
from tests.serve.conftest import ENGINES, ROOT
from tests.serve.test_engines import vllm_bound
from tests.support.slurm_conf import CONTROLLER
from tests.support.virtual_hosts import VirtualHosts
from tests.support.wait import wait_for

NODES = ("n1", "n2")
START_S = 300
# Without a compiled model, vLLM 0.32's CPU build leaves out the buffers for what a pipeline rank receives (AssertionError in
# sync_and_gather_intermediate_tensors). Mode 2 with the backend eager compiles nothing, and makes them.
OPTIONS = ('--compilation-config={"mode": 2, "backend": "eager"}',)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[VirtualHosts]:
    """Two hosts and a login node, without Slurm. Each has its own network, and no address but its own and 127.0.0.1."""
    hosts = VirtualHosts(tmp_path / "hosts")
    for name in ("etc", "run", "log"):
        (hosts.folder / name).mkdir(parents=True)
    lines = ["127.0.0.1 localhost", *(f"{hosts.address(name)} {name}" for name in NODES)]
    (hosts.folder / "etc" / "hosts").write_text("\n".join(lines) + "\n")
    try:
        hosts.start_bridge()
        for name in NODES:
            hosts.start_host(name)
            hosts.connect(name)
        yield hosts
    finally:
        for name in (*NODES, CONTROLLER):
            hosts.power_off(name)


def write_spec(folder: Path, export: Path) -> Path:
    """Write the spec of a server with one pipeline rank on each node, and return its path."""
    key_file = folder / "api_key.yaml"
    create_key_file(key_file)
    path = folder / "job.json"
    ServeSpec(
        run="small",
        stage="main",
        export=str(export),
        dtype="fp32",
        serving=Serving(
            engine="vllm", python=(ENGINES["vllm"],), options=OPTIONS, environment={"VLLM_CPU_KVCACHE_SPACE": "1"}
        ),
        model_name="small-main",
        nodes=2,
        tensor=1,
        pipeline=2,
        expert_parallel=False,
        context=64,
        max_running_requests=8,
        port=None,
        start_timeout_s=START_S,
        drain_s=10,
        key_file=str(key_file),
        folder=str(folder),
        local=False,
    ).write(path)
    return path


def start(hosts: VirtualHosts, spec: Path, rank: int) -> subprocess.Popen[bytes]:
    """Start a node's part of the job with the variables that srun and the supervisor set."""
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
    code = {"PYTHONPATH": f"{ROOT / 'workflow'}:{ROOT}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    variables = {**place, **code, "MASTER_ADDR": NODES[0], "MASTER_PORT": 20017}
    words = ["env", *(f"{name}={value}" for name, value in variables.items())]
    words += [sys.executable, "-m", "longhaul", "job", "run", "serve", str(spec)]
    with spec.with_name(f"node-{rank}.log").open("wb") as log:
        command = hosts.command(words, host=NODES[rank], cwd=spec.parent)
        return subprocess.Popen(command, stdout=log, stderr=log, env=hosts.environment(), start_new_session=True)


def ask(hosts: VirtualHosts, endpoint: Endpoint, key: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask from the login node."""
    header = ["-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json"]
    return json.loads(hosts.run("curl", "-s", *header, "-d", json.dumps(body), f"{endpoint.url}/completions"))


@pytest.mark.timeout(600)
def test_two_hosts_serve_one_model(
    hosts: VirtualHosts, exports: dict[str, Path], prompts: Path, reference: dict[str, Any], tmp_path: Path
):
    folder = tmp_path / "job"
    folder.mkdir()
    spec = write_spec(folder, exports["llama"].parents[1] / "main.json")
    parts = [start(hosts, spec, rank) for rank in range(len(NODES))]

    def is_ready() -> bool:
        assert [part.poll() for part in parts] == [None, None], (folder / "node-0.log").read_text()[-3000:]
        found = read_endpoint(JobFolder(folder).endpoint)
        return bool(found and found.ready)

    wait_for(is_ready, START_S)
    endpoint = read_endpoint(JobFolder(folder).endpoint)
    assert endpoint is not None
    assert endpoint.url.startswith(f"http://{hosts.address('n1')}:")
    assert "PP1" in (folder / "node-1.log").read_text(), "the second host has the second half of the layers"
    key = (folder / "api_key.yaml").read_text().split()[1]
    for ids, expected in list(zip(json.loads(prompts.read_text()), reference["llama"]["scores"], strict=True))[:3]:
        body = {"model": "small-main", "prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
        found = ask(hosts, endpoint, key, body)["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids)]
        assert max(abs(one - other) for one, other in zip(found, expected, strict=True)) < vllm_bound("llama")
