"""The whole chain through profiles/slurm, over two nodes with two processes each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chain import Chain, tiny_config
from cluster_chain import ClusterChain, fake_image
from test_virtual_cluster import wait_for
from virtual_cluster import VirtualCluster


@pytest.fixture(scope="module")
def finished_on_cluster(cluster: VirtualCluster, tmp_path_factory: pytest.TempPathFactory) -> ClusterChain:
    """A finished run on 2 x 2 ranks whose jobs ran in a container without a Slurm client."""
    folder = tmp_path_factory.mktemp("on-cluster")
    config = tiny_config()
    config["checks"]["nodes"] = 2
    for stage in config["stages"]:
        stage.update(nodes=2, gpus_per_node=2)
    software = {"kind": "container", "path": str(fake_image(folder))}
    chain = ClusterChain(folder, config, cluster, software=software)
    chain.run()
    return chain


def weights_of(chain: Chain, stage: str) -> Path:
    return chain.folder / chain.read(f"stages/{stage}/checkpoint.json")["weights"]


def losses_in(weights: Path) -> list[float]:
    rows = map(json.loads, (weights / "metrics.jsonl").read_text().splitlines())
    return [row.get("loss", row.get("validation_loss")) for row in rows]


def test_both_nodes_took_part(finished_on_cluster: ClusterChain):
    hosts = {"n1", "n2"}
    assert {node["host"] for node in finished_on_cluster.read("environment.json")["nodes"]} == hosts
    assert set(finished_on_cluster.read("fabric.json")["hosts"]) == hosts
    assert finished_on_cluster.read("fabric.json")["world_size"] == 4
    for stage in ("base", "chat"):
        leg = json.loads((weights_of(finished_on_cluster, stage) / "legs.jsonl").read_text())
        assert set(leg["hosts"]) == hosts and leg["world_size"] == 4 and leg["nodes"] == 2
    assert finished_on_cluster.read("export/chat.json")["proof"]["logits"]["bit_equal"]
    report = (finished_on_cluster.results / "report.html").read_text()
    assert "n1, n2" in report


def test_the_same_world_size_here_gives_the_same_losses(finished_on_cluster: ClusterChain, finished: Chain):
    for stage in ("base", "chat"):
        here, there = (losses_in(weights_of(chain, stage)) for chain in (finished, finished_on_cluster))
        assert there == pytest.approx(here, rel=1e-6)


def test_it_holds_nothing_of_the_demo(finished_on_cluster: ClusterChain):
    assert sorted(path.name for path in (finished_on_cluster.folder / "results").iterdir()) == ["tiny"]
    shown = (finished_on_cluster.results / "config.yaml").read_text()
    assert shown == (finished_on_cluster.folder / "run.yaml").read_text()
    assert "stdlib" not in shown + (finished_on_cluster.results / "plan.json").read_text()


def test_sbatch_by_hand_does_the_same_job(finished_on_cluster: ClusterChain, cluster: VirtualCluster):
    stage = finished_on_cluster.results / "stages" / "base"
    before = (stage / "checkpoint.json").read_bytes()
    (stage / "checkpoint.json").unlink()
    weights_of_chain = next((stage / "weights").iterdir())
    kept = losses_in(weights_of_chain)
    weights_of_chain.rename(stage / "kept")
    path = finished_on_cluster.environment()["PATH"]
    cluster.run("env", f"PATH={path}", "sbatch", str(stage / "job.sbatch"), cwd=Path("/"))
    wait_for((stage / "checkpoint.json").exists, 120)
    wait_for(lambda: not cluster.run("squeue", "-h").strip(), 30)
    now, then = json.loads((stage / "checkpoint.json").read_bytes()), json.loads(before)
    assert losses_in(weights_of_chain) == kept
    assert {key: now[key] for key in ("weights", "spec", "steps")} == {
        key: then[key] for key in ("weights", "spec", "steps")
    }


def test_an_allocation_of_another_size_is_refused(
    finished_on_cluster: ClusterChain, cluster: VirtualCluster, tmp_path: Path
):
    launch = finished_on_cluster.results / "stages" / "base" / "launch.sh"
    log = tmp_path / "log"
    cluster.run("sbatch", "--wait", "--nodes=1", f"--output={log}", f"--wrap=bash {launch}", check=False)
    assert "the allocation has 1 nodes; the plan says 2" in log.read_text()
