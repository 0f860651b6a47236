"""The demo through profiles/slurm, over two nodes with two processes each, in a container without a Slurm client."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import yaml

from tests.cluster.test_virtual_cluster import wait_for
from tests.support.chain import REPOSITORY, Chain, leaks, local_site, write_site
from tests.support.cluster_chain import SITE, ClusterChain, fake_image
from tests.support.virtual_cluster import VirtualCluster

HOSTS = {"n1", "n2"}
COMPARED_STEPS = 20
"""Enough for routing, clipping and Adam to tell a difference; all 240 would take minutes."""


@pytest.fixture(scope="module")
def demo(cluster: VirtualCluster, tmp_path_factory: pytest.TempPathFactory) -> ClusterChain:
    """The finished demo; only its site and the places of its processes are changed."""
    folder = tmp_path_factory.mktemp("demo")
    config = yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text())
    config["site"], config["checks"]["nodes"] = "./site.yaml", 2
    for stage in config["stages"]:
        stage.update(nodes=2, gpus_per_node=2, micro_batch_size=2)
    chain = ClusterChain(folder, config, cluster, software={"kind": "container", "path": str(fake_image(folder))})
    chain.run(timeout_s=580)
    return chain


def validation_losses(demo: ClusterChain, stage: str) -> list[float]:
    lines = (demo.weights(stage) / "metrics.jsonl").read_text().splitlines()
    return [row["validation_loss"] for row in map(json.loads, lines) if "validation_loss" in row]


@pytest.mark.timeout(700)
def test_both_nodes_took_part(demo: ClusterChain):
    assert {node["host"] for node in demo.read("environment.json")["nodes"]} == HOSTS
    assert set(demo.read("fabric.json")["hosts"]) == HOSTS and demo.read("fabric.json")["world_size"] == 4
    for stage in ("pretrain", "chat"):
        leg = json.loads((demo.weights(stage) / "attempts.jsonl").read_text())
        assert set(leg["hosts"]) == HOSTS and leg["world_size"] == 4
    assert "n1, n2" in (demo.results / "report.html").read_text()


def training_losses(weights: Path) -> list[float]:
    """Of the first COMPARED_STEPS steps, as far as they are done; the last line may still be half written."""
    path = weights / "metrics.jsonl"
    rows = (json.loads(line) for line in path.open() if line.endswith("\n")) if path.exists() else ()
    return list(islice((row["loss"] for row in rows if "loss" in row), COMPARED_STEPS))


@pytest.fixture(scope="module")
def twin(demo: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The demo's data and tokenizer in a folder of its own, and its first stage rendered for 4 ranks of this machine."""
    config = json.loads(json.dumps(demo.config))
    config["checks"]["nodes"] = 1
    for stage in config["stages"]:
        stage.update(nodes=1, gpus_per_node=4)
    twin = Chain(tmp_path_factory.mktemp("twin"), config)
    shutil.copytree(demo.folder / "results", twin.folder / "results", ignore=shutil.ignore_patterns("stages"))
    # As many threads a rank as there: the site's cores are shared out to twice as many ranks of a node.
    site = local_site()
    write_site(twin.folder, site | {"node": site["node"] | {"cpus": 2 * SITE["node"]["cpus"]}})
    command = [sys.executable, "-m", "longhaul", "render", str(twin.folder / "run.yaml")]
    subprocess.run(command, cwd=twin.folder, check=True, env=twin.environment())
    return twin


def test_it_gives_the_same_losses_as_the_same_world_size_here(demo: Chain, twin: Chain):
    weights = twin.results / "stages/pretrain/weights" / demo.weights("pretrain").name
    command, log = ["bash", str(twin.results / "stages/pretrain/launch.sh")], twin.folder / "log"
    with log.open("w") as stream:
        here = subprocess.Popen(command, cwd=twin.folder, stdout=stream, stderr=stream, env=twin.environment())
        try:
            wait_for(lambda: len(training_losses(weights)) == COMPARED_STEPS or here.poll() is not None, 240)
        finally:
            here.terminate()  # the supervisor passes it on, and the training saves and leaves
            here.wait(60)
    assert training_losses(weights) == pytest.approx(training_losses(demo.weights("pretrain")), rel=1e-6), (
        log.read_text()
    )


def test_no_secret_is_in_what_it_wrote(demo: ClusterChain):
    assert leaks(demo.folder) == []


def test_it_learns(demo: ClusterChain):
    entropy = demo.read("data/stdlib.json")["unigram_entropy_nats"]
    assert validation_losses(demo, "pretrain")[-1] < entropy - 1.0
    before, *_, after = validation_losses(demo, "chat")
    assert after < before - 0.5


def test_the_export_answers_and_ends(demo: ClusterChain):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = demo.read("export/chat.json")
    assert (
        export["proof"]["logits"]["bit_equal"]
        and export["proof"]["tensors"]["equal"] == export["proof"]["tensors"]["count"]
    )
    folder = demo.folder / export["path"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = [{"role": "user", "content": "What does os.path.join do?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=96, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert all(sample["ended_with_eos"] for sample in export["samples"])


def test_the_jobs_saw_no_slurm_client(demo: ClusterChain, tmp_path: Path):
    """The stand-in for Apptainer hides it; the launch script talks to Slurm outside."""
    steps = demo.read("stages/chat/launch.json")["steps"]
    assert all({"srun", "apptainer"} <= set(step["command"]) for step in steps)
    seen = demo.cluster.run(
        "env",
        f"PATH={demo.environment()['PATH']}",
        "apptainer",
        "exec",
        str(demo.folder / "job.sif"),
        "scontrol",
        "ping",
        check=False,
    )
    assert seen == ""
