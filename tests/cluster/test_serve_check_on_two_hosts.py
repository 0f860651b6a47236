"""The check of a server on two hosts: one result from the first host, and the second host's part ends with the first one's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from longhaul.artifacts.serve_check_result import ServeCheckResult
from longhaul.config.serve_check_config import ServeCheck
from longhaul.config.serve_config import Serve
from longhaul.config.serving_config import Serving
from longhaul.jobs.kinds.serve_check_job import ServeCheckSpec
from tests.support import bigram_engine
from tests.support.pipeline_run import REPOSITORY
from tests.support.served_export import write_manifest
from tests.support.virtual_hosts import VirtualHosts, two_hosts
from tests.support.wait import wait_for

NODES = ("n1", "n2")
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
    ids_PT = np.random.default_rng(3).permutation(bigram_engine.VOCABULARY).reshape(2, -1)
    manifest = write_manifest(folder, model, ids_PT, bigram_engine.logits()[ids_PT], [], [])
    python = (sys.executable, bigram_engine.__file__)
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


def start(hosts: VirtualHosts, job: Path) -> list[subprocess.Popen[bytes]]:
    """Start each host's part of the job with the variables that srun and the supervisor set."""
    parts = []
    for rank, host in enumerate(NODES):
        place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
        code = {"PYTHONPATH": f"{REPOSITORY / 'workflow'}:{REPOSITORY}", "OMP_NUM_THREADS": 1}
        variables = {**place, **code, "MASTER_ADDR": NODES[0], "MASTER_PORT": 20017}
        words = ["env", *(f"{name}={value}" for name, value in variables.items())]
        words += [sys.executable, "-m", "longhaul", "job", "run", "serve_check", str(job)]
        with job.with_name(f"{host}.log").open("wb") as log:
            command = hosts.command(words, host=host, cwd=job.parent)
            parts.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=hosts.environment(), start_new_session=True)
            )
    return parts


def engines(hosts: VirtualHosts, host: str) -> list[str]:
    """Return the command lines of the engine's processes on a host."""
    running = hosts.run("ps", "-eo", "args", host=host).splitlines()
    return [line for line in running if "vllm.entrypoints" in line and "guard_processes" not in line]


def ends(parts: list[subprocess.Popen[bytes]]) -> list[int]:
    return [part.wait(timeout=END_S) for part in parts]


def test_the_first_host_checks_a_server_that_both_hosts_serve(hosts: VirtualHosts, tmp_path: Path):
    job = write_job(tmp_path, QUICK)
    assert ends(start(hosts, job)) == [0, 0], (tmp_path / "n1.log").read_text()
    result = ServeCheckResult.read(tmp_path / "result.json")
    assert (result.nodes, result.tensor, result.pipeline) == (2, 1, 2)
    assert (result.agreement["largest_difference"] or 1) < 1e-5 and result.refuses_other_keys
    assert [address.split(":")[0] for address in result.listens_at if not address.endswith(":20017")] == ["127.0.0.1"]
    assert "1 parts of the engine reached, with answers" in (tmp_path / "n1.log").read_text()
    assert "1 parts of the engine reached, without answers" in (tmp_path / "n2.log").read_text()
    assert [engines(hosts, host) for host in NODES] == [[], []]


def test_the_error_of_the_first_host_is_the_jobs(hosts: VirtualHosts, tmp_path: Path):
    job = write_job(tmp_path, QUICK, "another_model")
    assert ends(start(hosts, job)) == [2, 0]
    assert "log probabilities of the server differ from the trainer's" in (tmp_path / "n1.log").read_text()
    assert "error" not in (tmp_path / "n2.log").read_text() and not (tmp_path / "result.json").exists()


def test_no_process_is_left_after_kill_9_of_the_check(hosts: VirtualHosts, tmp_path: Path):
    parts = start(hosts, write_job(tmp_path, LONG))
    wait_for(lambda: all(engines(hosts, host) for host in NODES), END_S)
    hosts.run("pkill", "-9", "-f", "job run serve_check", host=NODES[0])
    codes = ends(parts)
    assert codes[0] != 0 and codes[1] == 0
    wait_for(lambda: not any(engines(hosts, host) for host in NODES))
