"""`longhaul serve` as a job on two nodes: the engine's start on each node, the address, the key, the end of the allocation."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest

from longhaul.artifacts.endpoint import Endpoint
from tests.support.pipeline_run_on_cluster import SITE as CLUSTER
from tests.support.run_with_fake_engine import KEY, ServedRun
from tests.support.slurm_conf import CONTROLLER
from tests.support.virtual_cluster import VirtualCluster
from tests.support.wait import wait_for, wait_for_end

SITE = {
    "partitions": [
        {**CLUSTER["partitions"][0], "node": {"cpus": 8, "memory_mb": 8000, "gpus": 2}, "gpu_request": "gres"},
    ],
    "interconnect": CLUSTER["interconnect"],
    "deadline_poll_interval_s": 1.0,
}


class ServedOnCluster(ServedRun):
    """A run whose verbs are called on the login node."""

    def __init__(self, folder: Path, cluster: VirtualCluster, nodes: int = 2) -> None:
        super().__init__(folder, {"nodes": nodes, "gpus_per_node": 2, "drain_s": 5, "minutes": 5}, SITE)
        self.cluster = cluster

    def command(self, *options: str) -> list[str]:
        return self.cluster.command(super().command(*options), cwd=self.folder)

    def environment(self) -> dict[str, str]:
        return {**super().environment(), **VirtualCluster.environment()}

    def ask(self, endpoint: Endpoint, key: str | None) -> str:
        """Return the status code that the login node gets."""
        header = ["-H", f"Authorization: Bearer {key}"] if key else []
        return self.cluster.run(
            "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", *header, f"{endpoint.url}/models"
        )

    def ask_until_drain(self, endpoint: Endpoint) -> subprocess.Popen[str]:
        """Send a request from the login node that the engine answers while it drains; return when the engine has it."""
        header = ["-H", f"Authorization: Bearer {KEY}"]
        words = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", *header, f"{endpoint.url}/until-drain"]
        environment = self.environment()
        asked = subprocess.Popen(self.cluster.command(words), stdout=subprocess.PIPE, text=True, env=environment)
        wait_for((self.folder / "held-request").exists)
        return asked

    def queue(self) -> str:
        return self.cluster.run("squeue", "-h", "-o", "%i %T %k").strip()


@pytest.fixture
def run(cluster: VirtualCluster, tmp_path: Path) -> ServedOnCluster:
    served = ServedOnCluster(tmp_path.resolve(), cluster)
    served.write_export()
    return served


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_server_on_two_nodes_drains_at_the_end_of_its_allocation_and_restarts_in_the_next(run: ServedOnCluster):
    submitted = run.call()
    assert submitted.returncode == 0, submitted.stderr
    job_id = submitted.stdout.split()[2].rstrip(";")
    endpoint = run.wait_until_ready()
    wait_for(lambda: run.started_engines(1))  # the second node's engine may start later
    first, second = run.started_engines(0)[0], run.started_engines(1)[0]
    leader = first[first.index("--master-addr") + 1]
    assert endpoint.url.split(":")[1] == f"//{leader}" and not leader.startswith("127.")
    assert endpoint.owner.job_id == job_id and endpoint.owner.host == "n1"
    for rank, command in enumerate((first, second)):
        options = dict(itertools.pairwise(command))
        assert (options["--nnodes"], options["--node-rank"], options["--master-addr"]) == ("2", str(rank), leader)
        assert (options["--tensor-parallel-size"], options["--pipeline-parallel-size"]) == ("2", "2")
    assert first[first.index("--host") + 1] == leader != second[second.index("--host") + 1]
    assert "--headless" in second and "--headless" not in first
    assert [run.ask(endpoint, key) for key in (None, "wrong", KEY)] == ["401", "401", "200"]
    again = run.call()
    assert again.returncode == 2 and f"job {job_id} (RUNNING) serves stage base already" in again.stderr
    asked, engines = run.ask_until_drain(endpoint), run.processes()
    run.cluster.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=1")
    wait_for(lambda: run.state and run.state.state == "waiting", 90)
    wait_for(lambda: run.queue().startswith(f"{job_id} PENDING"), 60)
    assert run.state and run.state.reason == "the allocation ends" and not run.job.endpoint.exists()
    run.cluster.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=5")
    assert asked.communicate(timeout=20)[0] == "200", "the request was accepted before the end"
    wait_for_end(engines)
    restarted = run.wait_until_ready(120)
    wait_for(lambda: len(run.started_engines(1)) == 2)
    assert len(run.started_engines(0)) == 2
    assert restarted.owner.job_id == job_id and restarted.owner.pid != endpoint.owner.pid
    assert run.state and (run.state.state, run.state.allocation) == ("running", 2)
    assert [run.ask(restarted, key) for key in (None, KEY)] == ["401", "200"]
    stopped = run.call("--stop")
    assert stopped.stdout == f"cancelled job {job_id}\n", stopped.stderr
    wait_for(lambda: not run.queue())


def test_stop_cancels_the_job_and_leaves_no_process(run: ServedOnCluster):
    assert run.call().returncode == 0
    run.wait_until_ready()
    wait_for(lambda: len(run.started_engines(1)) == 1 and run.processes())  # the second node's engine may start later
    assert run.call("--stop").returncode == 0
    wait_for(lambda: not run.queue() and not run.processes())
    assert run.state and run.state.state == "failed" and run.state.reason == "cancelled: cancelled by scancel"
    shown = subprocess.run(
        run.cluster.command([*ServedRun.command(run)[:3], "status", "results/small"], cwd=run.folder),
        env=run.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "serve-base" not in shown.stdout


def test_a_node_that_takes_its_name_for_the_loopback_serves_the_cluster(cluster: VirtualCluster, tmp_path: Path):
    """As Debian writes /etc/hosts."""
    names = tmp_path / "hosts"
    names.write_text(f"127.0.0.1 localhost\n127.0.1.1 n1 n2\n{cluster.address(CONTROLLER)} {CONTROLLER}\n")
    run = ServedOnCluster(tmp_path.resolve(), cluster, nodes=1)
    run.write_export()
    for node in ("n1", "n2"):
        cluster.run("mount", "--bind", str(names), "/etc/hosts", host=node)
    try:
        assert run.call().returncode == 0
        endpoint = run.wait_until_ready()
        assert endpoint.url.startswith(f"http://{cluster.address(endpoint.owner.host)}:")
        assert run.ask(endpoint, KEY) == "200"
        assert run.call("--stop").returncode == 0
        wait_for(lambda: not run.queue() and not run.processes())
    finally:
        for node in ("n1", "n2"):
            cluster.run("umount", "/etc/hosts", host=node)
