"""A stage's job.sbatch, submitted with sbatch on two nodes, gives the results of a run on one machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pipeline_run import PipelineRun, write_site
from tests.support.pipeline_run_on_cluster import SITE
from tests.support.virtual_cluster import VirtualCluster
from tests.support.wait import wait_for


def losses(weights: Path) -> list[float]:
    rows = map(json.loads, (weights / "metrics.jsonl").read_text().splitlines())
    return [row.get("loss", row.get("validation_loss")) for row in rows]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rendered(finished: PipelineRun, tmp_path_factory: pytest.TempPathFactory) -> PipelineRun:
    """The finished run's data and tokenizer in another folder, with its first stage rendered for 2 nodes of 1 rank."""
    copy = PipelineRun(tmp_path_factory.mktemp("sbatch"), json.loads(json.dumps(finished.config)))
    shutil.copytree(finished.results, copy.results, symlinks=True)
    shutil.rmtree(copy.results / "stages")
    write_site(copy.folder, SITE)
    copy.config["stages"][0].update(nodes=2, gpus_per_node=1)
    copy.save()
    command = [sys.executable, "-m", "longhaul", "job", "render", str(copy.folder / "run.yaml")]
    subprocess.run(command, cwd=copy.folder, check=True, env=copy.environment())
    return copy


def test_losses_equal_those_of_the_same_world_size_on_one_machine(
    rendered: PipelineRun, finished: PipelineRun, cluster: VirtualCluster
):
    stage = rendered.results / "stages" / "base"
    cluster.run("sbatch", str(stage / "job.sbatch"), cwd=Path("/"))
    wait_for((stage / "checkpoint.json").exists, 120)
    weights = rendered.weights("base")
    attempt = json.loads((weights / "attempts.jsonl").read_text())
    assert set(attempt["hosts"]) == {"n1", "n2"} and attempt["world_size"] == 2
    assert losses(weights) == pytest.approx(losses(finished.weights("base")), rel=1e-6)
    assert weights.name == finished.weights("base").name
    wait_for(lambda: not cluster.run("squeue", "-h").strip(), 30)


def test_allocation_of_another_size_is_refused(rendered: PipelineRun, cluster: VirtualCluster, tmp_path: Path):
    launch, log = rendered.results / "stages" / "base" / "launch.sh", tmp_path / "log"
    cluster.run("sbatch", "--wait", "--nodes=1", f"--output={log}", f"--wrap=bash {launch}", check=False)
    assert "the allocation has 1 nodes; the plan says 2" in log.read_text()


def test_launch_script_is_refused_outside_an_allocation(rendered: PipelineRun):
    launch = rendered.results / "stages" / "base" / "launch.sh"
    environment = {key: value for key, value in rendered.environment().items() if key != "SLURM_JOB_ID"}
    done = subprocess.run(["bash", str(launch)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0 and "submit job.sbatch with sbatch" in done.stderr
