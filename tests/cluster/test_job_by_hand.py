"""A stage's job.sbatch, submitted by hand on two nodes, does what the chain did on one machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.test_virtual_cluster import wait_for
from tests.support.chain import Chain, write_site
from tests.support.cluster_chain import SITE
from tests.support.virtual_cluster import VirtualCluster


def losses(weights: Path) -> list[float]:
    rows = map(json.loads, (weights / "metrics.jsonl").read_text().splitlines())
    return [row.get("loss", row.get("validation_loss")) for row in rows]


@pytest.fixture(scope="module")
def rendered(finished: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The finished run's data and tokenizer in a folder of its own, and its first stage rendered for 2 nodes x 1 rank."""
    twin = Chain(tmp_path_factory.mktemp("by-hand"), json.loads(json.dumps(finished.config)))
    shutil.copytree(finished.results, twin.results)
    shutil.rmtree(twin.results / "stages")
    write_site(twin.folder, SITE)
    twin.config["stages"][0].update(nodes=2, gpus_per_node=1)
    twin.save()
    command = [sys.executable, "-m", "longhaul", "render", str(twin.folder / "run.yaml")]
    subprocess.run(command, cwd=twin.folder, check=True, env=twin.environment())
    return twin


def test_it_gives_the_same_losses_as_the_same_world_size_here(
    rendered: Chain, finished: Chain, cluster: VirtualCluster
):
    stage = rendered.results / "stages" / "base"
    cluster.run("sbatch", str(stage / "job.sbatch"), cwd=Path("/"))
    wait_for((stage / "checkpoint.json").exists, 120)
    weights = rendered.weights("base")
    leg = json.loads((weights / "attempts.jsonl").read_text())
    assert set(leg["hosts"]) == {"n1", "n2"} and leg["world_size"] == 2
    assert losses(weights) == pytest.approx(losses(finished.weights("base")), rel=1e-6)
    assert weights.name == finished.weights("base").name
    wait_for(lambda: not cluster.run("squeue", "-h").strip(), 30)


def test_an_allocation_of_another_size_is_refused(rendered: Chain, cluster: VirtualCluster, tmp_path: Path):
    launch, log = rendered.results / "stages" / "base" / "launch.sh", tmp_path / "log"
    cluster.run("sbatch", "--wait", "--nodes=1", f"--output={log}", f"--wrap=bash {launch}", check=False)
    assert "the allocation has 1 nodes; the plan says 2" in log.read_text()


def test_the_login_node_is_no_place_to_launch_from(rendered: Chain):
    launch = rendered.results / "stages" / "base" / "launch.sh"
    environment = {key: value for key, value in rendered.environment().items() if key != "SLURM_JOB_ID"}
    done = subprocess.run(["bash", str(launch)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0 and "Submit job.sbatch" in done.stderr
