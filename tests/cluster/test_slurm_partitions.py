"""Jobs on a cluster that is set up like a centre: accounts, QOS, constraints and node shapes differ between partitions."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from longhaul.config.load_config import load_site
from longhaul.config.partition_config import JobPlace
from longhaul.config.site_config import Site
from tests.support.evaluation_task import TASK, write_task
from tests.support.fake_nvidia_smi import fake_nvidia_smi
from tests.support.pipeline_run import tiny_config
from tests.support.pipeline_run_on_cluster import PipelineRunOnCluster
from tests.support.running_cluster import running_cluster
from tests.support.slurm_conf import ClusterSize
from tests.support.virtual_cluster import VirtualCluster
from tests.support.wait import wait_for

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
TARGETS = (f"results/tiny/evaluation/base/trained/{TASK}.json", "results/tiny/data/chats.kept.json")


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    with running_cluster(tmp_path_factory.mktemp("centre"), ClusterSize(accounting=True, centre=True)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def chain(centre: VirtualCluster, tmp_path_factory: pytest.TempPathFactory) -> PipelineRunOnCluster:
    """A run whose first stage is trained, exported and evaluated. The check of its server is rendered only."""
    folder, config = tmp_path_factory.mktemp("run"), tiny_config()
    evaluate = {"tasks": [TASK], "files": [str(write_task(folder))], "minutes": 10}
    config["stages"][0].update(steps=4, evaluate=evaluate, serve_check={})
    chain = PipelineRunOnCluster(folder, config, centre, partitions=PARTITIONS)
    chain.run(*TARGETS, timeout_s=350)
    return chain


def recorded_jobs(cluster: VirtualCluster) -> list[dict[str, str]]:
    """Return what Slurm recorded of each job."""
    lines = cluster.run("scontrol", "--oneliner", "show", "job").splitlines()
    return [dict(re.findall(r"([\w/:]+)=(\S*)", line)) for line in lines]


def jobs_of_rules(cluster: VirtualCluster) -> dict[str, dict[str, str]]:
    """Return rule -> what Slurm recorded of its job."""
    jobs = [job for job in recorded_jobs(cluster) if "Comment" in job]
    return {job["Comment"].removeprefix("rule_").partition("_wildcards")[0]: job for job in jobs}


def test_each_job_runs_on_the_partition_of_its_kind_with_its_options(chain: PipelineRunOnCluster):
    jobs = jobs_of_rules(chain.cluster)
    keys = ("Partition", "Account", "QOS", "Features", "NodeList", "NumCPUs", "MinMemoryNode", "TimeLimit", "Nice")
    found = {rule: tuple(job.get(key) for key in keys) for rule, job in jobs.items()}
    cpu = ("cores", "proj_cpu", "normal", "(null)", "n2", "3", "2500M", "02:00:00", "0")
    few_cores = (*cpu[:5], "2", *cpu[6:])
    check = ("quick", "proj_gpu", "gpu_debug", "(null)", "n1", "2", "2000M", "00:20:00", "0")
    train = ("accelerated", "proj_gpu", "gpu_long", "gpu&h100", "n1", "2", "2000M", "00:05:00", "5")
    evaluate = (*train[:5], "1", "1000M", "00:10:00", "5")
    cpu_rules, check_rules = ("tokenizer", "tokenize", "export"), ("environment", "fabric")
    shapes = {**dict.fromkeys(cpu_rules, cpu), **dict.fromkeys(check_rules, check)}
    assert found == {"train": train, "evaluate": evaluate, "count_chats": few_cores, **shapes}
    assert {rule for rule in jobs if "gres/gpu=2" in jobs[rule]["TRES"]} == {"train", "evaluate"}
    assert not [rule for rule in shapes if "gpu" in jobs[rule]["TRES"]]


def test_sbatch_accepts_the_rendered_header_of_every_job(chain: PipelineRunOnCluster, centre: VirtualCluster):
    """The header of a job that is submitted by hand, and of the controller, on the partition of its kind."""
    scripts = [*chain.results.glob("**/job.sbatch"), chain.results / "controller.sbatch"]
    found: Counter[tuple[str, ...]] = Counter()
    for script in scripts:
        said = centre.run("sh", "-c", 'sbatch --test-only "$0" 2>&1', str(script), cwd=Path("/"))
        found[re.findall(r"using (\d+) processors on nodes (\w+) in partition (\w+)", said)[0]] += 1
    on_all_cores, counts, checks, trainings, evaluation_and_check_of_a_server, controller = 5, 1, 2, 2, 2, 1
    assert found == {
        ("3", "n2", "cores"): on_all_cores,
        ("2", "n2", "cores"): counts,
        ("2", "n1", "quick"): checks,
        ("2", "n1", "accelerated"): trainings,
        ("1", "n1", "accelerated"): evaluation_and_check_of_a_server,
        ("1", "n2", "shared"): controller,
    }


def changed_site(number: int, **keys: Any) -> list[dict[str, Any]]:
    """Return PARTITIONS with other keys in one of them."""
    return [{**partition, **(keys if place == number else {})} for place, partition in enumerate(PARTITIONS)]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("account", "nobody", "nobody appears to be invalid"),
        ("qos", "gpu_long", "Invalid qos"),
        ("constraint", "tpu", "feature"),
    ],
)
def test_a_wrong_option_of_one_partition_is_refused_by_slurm(
    chain: PipelineRunOnCluster, key: str, value: str, reason: str
):
    """Despite ten retries, Slurm's reason is the last that is printed, within a minute."""
    partitions = changed_site(2, **{key: value})
    other = PipelineRunOnCluster(chain.folder / f"wrong-{key}", chain.config, chain.cluster, partitions=partitions)
    begun = time.monotonic()
    done = other.snakemake("results/tiny/tokenizer.json", timeout_s=120)
    assert done.returncode == 1 and time.monotonic() - begun < 60, done.stderr
    cause, remedy = done.stderr.split("tokenizer failed (refused):")[1].strip().splitlines()
    assert "Slurm refused the job" in cause and reason in cause and f"correct {key}" in remedy, done.stderr


def expect_a_job_that_cannot_start(run: PipelineRunOnCluster, target: str, reason: str) -> None:
    """Start a run whose job is beyond a limit: it prints Slurm's reason. Slurm accepts such a job, and it waits without end."""
    log = run.folder / "main.log"
    with log.open("w") as stream:
        command = run.command(target)
        process = subprocess.Popen(
            command, cwd=run.folder, env=run.environment(), stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        wait_for(lambda: "will not start; Slurm's reason: " in log.read_text(), 60)
        assert f"will not start; Slurm's reason: {reason}" in log.read_text()
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # nsenter forwards no signal to its child
        process.wait(10)
        run.cluster.run("scancel", "--user=root")


def test_a_job_beyond_a_limit_is_named_with_slurms_reason(chain: PipelineRunOnCluster):
    """400 minutes are within the site file's limit, and not within the partition's."""
    config, partitions = {**chain.config, "data_minutes": 400}, changed_site(2, max_minutes=600)
    other = PipelineRunOnCluster(chain.folder / "limit", config, chain.cluster, partitions=partitions)
    expect_a_job_that_cannot_start(other, "results/tiny/tokenizer.json", "PartitionTimeLimit")


def test_a_job_beyond_a_limit_of_the_qos_is_named(chain: PipelineRunOnCluster):
    """25 minutes are within the limit of the partition, and not within that of the QOS."""
    config = {**chain.config, "checks": {**chain.config["checks"], "minutes": 25}}
    other = PipelineRunOnCluster(chain.folder / "limit-qos", config, chain.cluster, partitions=PARTITIONS)
    chain.cluster.run("sacctmgr", "-iQ", "modify", "qos", "gpu_debug", "set", "MaxWall=00:20:00")
    try:
        expect_a_job_that_cannot_start(other, "results/tiny/environment.json", "QOSMaxWallDurationPerJobLimit")
    finally:
        chain.cluster.run("sacctmgr", "-iQ", "modify", "qos", "gpu_debug", "set", "MaxWall=-1")


def test_a_partition_for_larger_jobs_is_named(chain: PipelineRunOnCluster):
    """A job on one node waits there without end."""
    other = PipelineRunOnCluster(
        chain.folder / "large", chain.config, chain.cluster, partitions=changed_site(2, name="large")
    )
    code, printed = longhaul(other, "site", "check", "run.yaml")
    assert code == 1 and "cpu, nodes at least: jobs on fewer than 2 nodes never start there" in printed, printed
    expect_a_job_that_cannot_start(other, "results/tiny/tokenizer.json", "PartitionNodeLimit")


def longhaul(chain: PipelineRunOnCluster, *words: str, path: str = "") -> tuple[int, str]:
    """Return the exit code and the output of a verb on the login node. Cells of a table may have several lines."""
    command = chain.cluster.command([sys.executable, "-m", "longhaul", *words], cwd=chain.folder)
    environment = chain.environment()
    environment["PATH"] = f"{path}{environment['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.returncode, " ".join((done.stdout + done.stderr).replace("│", " ").split())


def test_site_check_shows_slurms_answer_to_each_request(chain: PipelineRunOnCluster):
    code, printed = longhaul(chain, "site", "check", "run.yaml")
    assert code == 0 and " NO " not in printed, printed
    partitions = changed_site(0, account="nobody")
    other = PipelineRunOnCluster(chain.folder / "checked", chain.config, chain.cluster, partitions=partitions)
    for file in ("run.yaml", "site.yaml"):
        code, printed = longhaul(other, "site", "check", file)
        assert code == 1 and "Invalid account" in printed and "correct account" in printed, printed


def test_site_check_compares_nodes_times_minutes(chain: PipelineRunOnCluster):
    """A QOS limits one job, and an account limits all its users together."""
    limits = {"qos gpu_debug": "MaxTRESMins=node", "account proj_cpu": "GrpTRESMins=cpu"}
    try:
        for (source, key), limit in zip(limits.items(), ("5", "100"), strict=True):
            chain.cluster.run("sacctmgr", "-iQ", "modify", *source.split(), "set", f"{key}={limit}")
        code, printed = longhaul(chain, "site", "check", "run.yaml")
    finally:
        for source, key in limits.items():
            chain.cluster.run("sacctmgr", "-iQ", "modify", *source.split(), "set", f"{key}=-1")
    assert code == 1, printed
    assert "at most 5 node minutes together; jobs beyond the limit of QOS gpu_debug do not start" in printed
    assert "at most 100 cpu minutes together; jobs beyond the limit of account proj_cpu do not start" in printed


@pytest.fixture(scope="module")
def found(chain: PipelineRunOnCluster) -> Site:
    """The site file that `site detect --probe` writes. nvidia-smi is a stand-in that finds two H200 on n1."""
    code, printed = longhaul(chain, "site", "detect", "--probe", "--out", "found.yaml", path=nvidia_smi_path(chain))
    assert code == 0 and "submitted probe job" in printed, printed
    return load_site("./found.yaml", chain.folder)


def nvidia_smi_path(chain: PipelineRunOnCluster) -> str:
    return fake_nvidia_smi(chain.folder, host="n1").partition(":")[0] + ":"


NODE, QOS, CHOICES = {"node"}, {"qos"}, {"constraint", "gres_extra", "cpu_bind", "sbatch_extra"}
"""Keys of a partition that `site detect` does not write as in the cluster's own file.

NODE:    the whole node; the own file uses a part of it
QOS:     Slurm's default QOS is written, too
CHOICES: Slurm does not know what users choose. The nodes' features are in a comment.
"""
DIFFERENT: dict[JobPlace, set[str]] = {"gpu": NODE | CHOICES, "debug": NODE, "cpu": NODE | QOS, "login": NODE | QOS}


def different_keys(ours: BaseModel, theirs: BaseModel) -> set[str]:
    return {key for key, value in ours if value != getattr(theirs, key)}


def test_site_detect_reproduces_the_clusters_own_site_file(found: Site, chain: PipelineRunOnCluster):
    own = load_site("./site.yaml", chain.folder)
    # The GPUs of this cluster are not real: its own file has none. eth0 is not known to be the network of the nodes.
    assert different_keys(found, own) == {"name", "partitions", "interconnect", "accelerator"}
    for place, different in DIFFERENT.items():
        ours, theirs = found.partition_for(place), own.partition_for(place)
        assert different_keys(ours, theirs) == different, place
        assert ours.qos == (theirs.qos or "normal"), place
        has_gpus = place in ("gpu", "debug")
        shape = {"cpus": 8, "memory_mb": 8000, "gpus": 2 if has_gpus else 0}
        rates = {"gpu_memory_gib": 140.4 if has_gpus else None, "gpu_peak_tflops": 989 if has_gpus else None}
        assert ours.node.model_dump() == {**shape, **rates}, "the whole node; the own file uses a part of it"
    text = (chain.folder / "found.yaml").read_text()
    assert "# constraint: nodes have the features gpu, h100" in text
    assert text.count("# PreemptMode REQUEUE: jobs of partition urgent take nodes from jobs here") == 4
    assert found.accelerator.build == "cuda 13.0"


def test_slurm_accepts_every_job_of_the_detected_site_and_the_nodes_fit(found: Site, chain: PipelineRunOnCluster):
    path = nvidia_smi_path(chain)
    code, printed = longhaul(chain, "site", "check", "found.yaml", "--probe", path=path)
    assert code == 0 and " NO " not in printed, printed
    assert "NVIDIA H200" in printed and printed.count("submitted probe job") == 4, printed
    probes = [job for job in recorded_jobs(chain.cluster) if job["JobName"] == "longhaul-probe"]
    accounts = {"accelerated": "proj_gpu", "quick": "proj_gpu", "cores": "proj_cpu", "shared": "proj_cpu"}
    expected = {(partition, account, "COMPLETED") for partition, account in accounts.items()}
    assert {(job["Partition"], job["Account"], job["JobState"]) for job in probes} == expected
    wrong = (chain.folder / "found.yaml").read_text().replace("gpu_memory_gib: 140.4", "gpu_memory_gib: 192")
    (chain.folder / "wrong.yaml").write_text(wrong)
    code, printed = longhaul(chain, "site", "check", "wrong.yaml", "--probe", path=path)
    assert code == 1 and "set node.gpu_memory_gib to 140.4" in printed, printed


def test_a_run_starts_with_the_detected_site(found: Site, chain: PipelineRunOnCluster):
    """With the first stage's export as the local model, and shorter sequences than the example's."""
    (chain.folder / "model").symlink_to(chain.folder / chain.read("export/base.json")["path"])
    (chain.folder / "data").mkdir()
    (chain.folder / "data" / "chats.jsonl").symlink_to(chain.folder / "chats.jsonl")
    options = ("--example", "local-one-gpu", "--site", "./found.yaml", "--run", "started")
    code, printed = longhaul(chain, "init", *options)
    assert code == 0 and "wrote started.yaml" in printed, printed
    config = chain.folder / "started.yaml"
    config.write_text(config.read_text().replace("sequence_length: 2048", "sequence_length: 64"))
    code, printed = longhaul(chain, "plan", "started.yaml")
    assert code == 0 and "train-sft" in printed, printed
    code, printed = longhaul(chain, "site", "check", "started.yaml")
    assert code == 0 and "train-sft" in printed and " NO " not in printed, printed


@pytest.mark.slow  # waits 15 s for the second try
def test_a_submit_limit_is_waited_for(chain: PipelineRunOnCluster):
    """Slurm's reason is printed at once, and the job is submitted again after a pause."""
    other = PipelineRunOnCluster(chain.folder / "submit-limit", chain.config, chain.cluster, partitions=PARTITIONS)
    chain.cluster.run("sacctmgr", "-iQ", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=0")
    log = other.folder / "main.log"
    try:
        with log.open("w") as stream:
            command = other.command("results/tiny/tokenizer.json")
            process = subprocess.Popen(command, cwd=other.folder, env=other.environment(), stdout=stream, stderr=stream)
        wait_for(lambda: "next try in 15 s" in log.read_text(), 60)
    finally:
        chain.cluster.run("sacctmgr", "-iQ", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=-1")
    assert process.wait(120) == 0, log.read_text()
    assert "warning: tokenizer: Slurm refused the job: " in log.read_text() and "submit limit" in log.read_text()
