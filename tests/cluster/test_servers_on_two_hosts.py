"""Servers on two hosts, without Slurm: a check's result, drained requests, and parts that end with the first host's process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from longhaul.artifacts.artifact_schemas import Export
from longhaul.artifacts.atomic_files import file_sha256
from longhaul.artifacts.endpoint import read_endpoint
from longhaul.artifacts.paths import JobFolder
from longhaul.artifacts.serve_check_result import ServeCheckResult
from longhaul.config.serve_check_config import ServeCheck
from longhaul.config.serve_config import Serve
from longhaul.config.site_serving_config import Serving
from longhaul.jobs.kinds.serve_check_job import ServeCheckSpec
from longhaul.serving.api_key import create_key_file
from tests.support import bigram_vllm
from tests.support.run_with_fake_engine import FAKE_VLLM, KEY
from tests.support.served_export import write_manifest
from tests.support.server_on_two_hosts import NODES, start_parts, write_server_spec
from tests.support.virtual_hosts import VirtualHosts, two_hosts
from tests.support.wait import wait_for

END_S = 300
QUICK, LONG = ServeCheck(streams=(1, 8), answer_tokens=4), ServeCheck(streams=(1,), answer_tokens=4096)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def write_job(folder: Path, check: ServeCheck, fault: str = "") -> Path:
    """Write the spec of a check of the table of bigrams, which one pipeline rank on each host serves; return its path."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    ids_PT = np.random.default_rng(3).permutation(bigram_vllm.VOCABULARY).reshape(2, -1)
    manifest = write_manifest(folder, model, ids_PT, bigram_vllm.logits()[ids_PT], [], [])
    python = (sys.executable, bigram_vllm.__file__)
    job = ServeCheckSpec(
        run="unit",
        stage="main",
        export=str(manifest),
        dtype="fp32",
        serving=Serving(engine="vllm", python=python, environment={"FAULT": fault}),
        serve=Serve(),
        check=check,
        nodes=2,
        tensor=1,
        pipeline=2,
        context_tokens=64,
        out=str(folder / "result.json"),
    )
    job.write(folder / "job.json")
    return folder / "job.json"


def write_server(folder: Path) -> Path:
    """Write the spec of a server, whose engine is tests/support/fake_vllm.py; return its path."""
    model, manifest = folder / "model", folder / "export.json"
    model.mkdir()
    (model / "config.json").write_text("{}")
    files = {"config.json": file_sha256(model / "config.json")}
    Export("main", "c", 1, str(model), "fp32", 1, 1, files, {}, [], {}).write(manifest)
    create_key_file(folder / "api_key.yaml", KEY)
    return write_server_spec(folder, manifest, Serving.model_validate(FAKE_VLLM, strict=False), END_S, drain_s=60)


def engines(hosts: VirtualHosts, host: str) -> list[str]:
    """Return the command lines of the engine's processes on a host."""
    running = hosts.run("ps", "-ww", "-eo", "args", host=host).splitlines()
    return [line for line in running if "vllm.entrypoints" in line and "guard_processes" not in line]


def ends(parts: list[subprocess.Popen[bytes]]) -> list[int]:
    return [part.wait(timeout=END_S) for part in parts]


def test_the_first_host_checks_a_server_that_both_hosts_serve(hosts: VirtualHosts, tmp_path: Path):
    job = write_job(tmp_path, QUICK)
    assert ends(start_parts(hosts, "serve_check", job, 20017)) == [0, 0], (tmp_path / "n1.log").read_text()
    result = ServeCheckResult.read(tmp_path / "result.json")
    assert (result.nodes, result.tensor, result.pipeline) == (2, 1, 2)
    assert (result.agreement["largest_difference"] or 1) < 1e-5 and result.refuses_other_keys
    assert [address.split(":")[0] for address in result.listens_at if not address.endswith(":20017")] == ["127.0.0.1"]
    assert "1 parts of the engine reached, with answers" in (tmp_path / "n1.log").read_text()
    assert "1 parts of the engine reached, without answers" in (tmp_path / "n2.log").read_text()
    assert [engines(hosts, host) for host in NODES] == [[], []]


def test_the_error_of_the_first_host_is_the_jobs(hosts: VirtualHosts, tmp_path: Path):
    job = write_job(tmp_path, QUICK, "another_model")
    assert ends(start_parts(hosts, "serve_check", job, 20027)) == [2, 0]
    assert "log probabilities of the server differ from the trainer's" in (tmp_path / "n1.log").read_text()
    assert "error" not in (tmp_path / "n2.log").read_text() and not (tmp_path / "result.json").exists()


def test_no_process_is_left_after_kill_9_of_the_check(hosts: VirtualHosts, tmp_path: Path):
    parts = start_parts(hosts, "serve_check", write_job(tmp_path, LONG), 20037)
    wait_for(
        lambda: all(engines(hosts, host) for host in NODES) or any(part.poll() is not None for part in parts), END_S
    )
    assert all(part.poll() is None for part in parts), (tmp_path / "n1.log").read_text()
    hosts.run("pkill", "-9", "-f", "job run serve_check", host=NODES[0])
    codes = ends(parts)
    assert codes[0] != 0 and codes[1] == 0
    wait_for(lambda: not any(engines(hosts, host) for host in NODES))


def test_after_sigterm_on_both_hosts_an_accepted_request_is_answered(hosts: VirtualHosts, tmp_path: Path):
    """Slurm sends SIGTERM to all hosts at once. The second host's part must live until the first one's is drained."""
    parts = start_parts(hosts, "serve", write_server(tmp_path), 20047)
    wait_for(lambda: (found := read_endpoint(JobFolder(tmp_path).endpoint)) and found.ready, END_S)
    endpoint = read_endpoint(JobFolder(tmp_path).endpoint)
    assert endpoint is not None and endpoint.url.startswith(f"http://{hosts.address(NODES[0])}:")
    header = ["-H", f"Authorization: Bearer {KEY}"]
    words = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", *header, f"{endpoint.url}/slow"]
    asked = subprocess.Popen(hosts.command(words), stdout=subprocess.PIPE, text=True, env=hosts.environment())
    wait_for((tmp_path / "slow-request").exists)
    wait_for(lambda: engines(hosts, NODES[1]))  # the stand-in on the first host answers before it
    for host in reversed(NODES):
        hosts.run("pkill", "-f", "job run serve", host=host)
    assert engines(hosts, NODES[1]), "the first host still answers"
    assert asked.communicate(timeout=END_S)[0] == "200"
    assert ends(parts) == [0, 0] and [engines(hosts, host) for host in NODES] == [[], []]
