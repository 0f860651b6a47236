"""Jobs on a cluster that is set up like a centre: accounts, QOS, constraints and node shapes differ between partitions."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longhaul.config.load_config import load_site
from tests.support.chain import tiny_config
from tests.support.cluster_chain import ClusterChain
from tests.support.running_cluster import running_cluster
from tests.support.slurm_conf import ClusterSize
from tests.support.virtual_cluster import VirtualCluster

pytestmark = pytest.mark.timeout(400)

GPU_NODE = {"cpus": 4, "memory_mb": 4000}
PARTITIONS: list[dict[str, Any]] = [
    {
        "jobs": ["gpu"],
        "name": "accelerated",
        "account": "proj_gpu",
        "qos": "gpu_long",
        "constraint": "gpu&h100",
        "max_minutes": 600,
        "node": GPU_NODE,
        # The nodes have no real GPUs, so the ranks train on cores. Slurm still allocates the GPUs.
        "gres_extra": ["gpu:2"],
        "cpu_bind": "none",
        "sbatch_extra": ["--nice=5"],
    },
    {
        "jobs": ["debug"],
        "name": "quick",
        "account": "proj_gpu",
        "qos": "gpu_debug",
        "max_minutes": 30,
        "node": GPU_NODE,
    },
    {
        "jobs": ["cpu"],
        "name": "cores",
        "account": "proj_cpu",
        "max_minutes": 300,
        "node": {"cpus": 3, "memory_mb": 2500},
    },
    {
        "jobs": ["login"],
        "name": "shared",
        "account": "proj_cpu",
        "max_minutes": 1200,
        "node": {"cpus": 1, "memory_mb": 500},
    },
]
STAGE = "results/tiny/stages/base/checkpoint.json"


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    with running_cluster(tmp_path_factory.mktemp("centre"), ClusterSize(accounting=True, centre=True)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def chain(centre: VirtualCluster, tmp_path_factory: pytest.TempPathFactory) -> ClusterChain:
    """A run whose first stage is trained."""
    config = tiny_config()
    config["stages"][0]["steps"] = 4
    chain = ClusterChain(tmp_path_factory.mktemp("run"), config, centre, partitions=PARTITIONS)
    chain.run(STAGE, timeout_s=350)
    return chain


def finished_jobs(cluster: VirtualCluster) -> dict[str, dict[str, str]]:
    """Return rule -> what Slurm recorded of its job."""
    lines = cluster.run("scontrol", "--oneliner", "show", "job").splitlines()
    jobs = [dict(re.findall(r"([\w/:]+)=(\S*)", line)) for line in lines]
    return {job["Comment"].removeprefix("rule_").partition("_wildcards")[0]: job for job in jobs if "Comment" in job}


def test_each_job_runs_on_the_partition_of_its_kind_with_its_options(chain: ClusterChain):
    jobs = finished_jobs(chain.cluster)
    keys = ("Partition", "Account", "QOS", "Features", "NodeList", "NumCPUs", "MinMemoryNode", "TimeLimit", "Nice")
    found = {rule: tuple(job.get(key) for key in keys) for rule, job in jobs.items()}
    cpu = ("cores", "proj_cpu", "normal", "(null)", "n2", "3", "2500M", "02:00:00", "0")
    check = ("quick", "proj_gpu", "gpu_debug", "(null)", "n1")
    assert found["train"] == ("accelerated", "proj_gpu", "gpu_long", "gpu&h100", "n1", "2", "2000M", "00:05:00", "5")
    assert found["tokenizer"] == found["tokenize"] == cpu
    assert found["environment"][:5] == found["fabric"][:5] == check
    assert "gres/gpu=2" in jobs["train"]["TRES"]
    assert not [rule for rule in ("tokenizer", "tokenize", "environment") if "gpu" in jobs[rule]["TRES"]]


def test_sbatch_accepts_the_rendered_header_of_every_job(chain: ClusterChain, centre: VirtualCluster):
    """The header of a job that is submitted by hand, and of the controller, on the partition of its kind."""
    scripts = [*chain.results.glob("**/job.sbatch"), chain.results / "controller.sbatch"]
    assert len(scripts) == 10
    for script in scripts:
        centre.run("sbatch", "--test-only", str(script), cwd=Path("/"))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("account", "nobody", "nobody appears to be invalid"),
        ("qos", "gpu_long", "Invalid qos"),
        ("constraint", "tpu", "feature"),
    ],
)
def test_a_wrong_option_of_one_partition_is_refused_by_slurm(chain: ClusterChain, key: str, value: str, reason: str):
    wrong = [*PARTITIONS[:2], {**PARTITIONS[2], key: value}, PARTITIONS[3]]
    other = ClusterChain(chain.folder / f"wrong-{key}", chain.config, chain.cluster, partitions=wrong)
    done = other.snakemake("results/tiny/tokenizer.json", "--retries=0", timeout_s=120)
    assert done.returncode == 1 and reason in done.stdout + done.stderr


def test_site_check_shows_slurms_answer_to_each_request(chain: ClusterChain):
    def check(folder: Path) -> tuple[int, str]:
        words = chain.cluster.command([sys.executable, "-m", "longhaul", "site", "check", "run.yaml"], cwd=folder)
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=chain.environment())
        return done.returncode, " ".join(
            (done.stdout + done.stderr).replace("│", " ").split()
        )  # cells have several lines

    code, printed = check(chain.folder)
    assert code == 0 and " NO " not in printed, printed
    wrong = [{**PARTITIONS[0], "account": "nobody"}, *PARTITIONS[1:]]
    other = ClusterChain(chain.folder / "checked", chain.config, chain.cluster, partitions=wrong)
    code, printed = check(other.folder)
    assert code == 1 and "Invalid account" in printed and "correct account" in printed, printed


def test_site_detect_finds_the_partitions_of_this_cluster(chain: ClusterChain):
    words = [sys.executable, "-m", "longhaul", "site", "detect", "--out", "found.yaml"]
    command = chain.cluster.command(words, cwd=chain.folder)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=chain.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    found = load_site("./found.yaml", chain.folder)
    gpu, debug, cpu = (found.partition_for(place) for place in ("gpu", "debug", "cpu"))
    assert (gpu.name, gpu.account, gpu.qos, gpu.node.gpus) == ("accelerated", "proj_gpu", "gpu_long", 2)
    assert (debug.name, debug.qos, debug.max_minutes) == ("quick", "gpu_debug", 30)
    assert (cpu.name, cpu.account, cpu.node.gpus) in [(name, "proj_cpu", 0) for name in ("cores", "shared")]
