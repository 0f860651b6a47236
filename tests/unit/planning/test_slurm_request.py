"""job.sbatch and the sbatch command of Snakemake's Slurm plugin must request the same resources."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string
from snakemake_executor_plugin_slurm.validation import validate_slurm_extra

from longhaul.artifacts.paths import JobId
from longhaul.config.site_config import NodeShape, Partition, Partitions, Site
from longhaul.jobs.job_kind import job_request, jobs_of
from longhaul.planning.slurm_request import (
    RESOURCE_KEYS,
    SlurmRequest,
    controller_request,
    cpu_request,
    gpu_request,
    one_minute_request,
    partition_for,
)
from tests.support.small_configs import plan_of

SHORT = {"-t": "--time", "-p": "--partition", "-A": "--account", "-C": "--constraint", "-D": "--chdir"}
PLUGIN_ONLY = {"--job-name", "--output", "--export", "--comment", "--parsable", "--chdir"}

SHAPES = [(1, 1, 0), (1, 1, 1), (1, 8, 8), (2, 1, 8), (2, 8, 8), (4, 8, 8), (64, 8, 8), (3, 5, 4)]
GPU_REQUESTS = [
    ("gpus_per_node", None),
    ("gpus_per_node", "a100"),
    ("gres", None),
    ("gres", "h100_80gb"),
    ("none", None),
]
MEMORIES = [None, 0, 123_456]
EXTRAS = [
    {},
    {"account": "proj-1", "qos": "long", "constraint": "[rack1|rack2]&ssd"},
    {"reservation": "maint_1", "exclusive": True},
]


class Resources(dict):
    """Stand-in for Snakemake's resources: keys are attributes, too."""

    __getattr__ = dict.__getitem__

    def __init__(self, values: dict[str, int | str]) -> None:
        super().__init__(values)
        if "slurm_extra" in values:
            object.__setattr__(self, "slurm_extra", values["slurm_extra"])


def submitted(request: SlurmRequest) -> str:
    """Return the sbatch command line that the plugin builds, with account and partition quoted as by its methods."""
    job = SimpleNamespace(resources=Resources(request.as_resources()), threads=1)
    validate_slurm_extra(job)
    params = {
        "run_uuid": "u",
        "slurm_logfile": "l",
        "comment_str": "c",
        "workdir": "/w",
        "account": f"-A {shlex.quote(request.account)}" if request.account else "",
        "partition": f"-p {shlex.quote(request.partition)}",
    }
    return get_submit_command(job, params) + set_gres_string(job)


def options(words: list[str]) -> dict[str, str]:
    """Return the values of an sbatch command line by long option."""
    found: dict[str, str] = {}
    while words:
        word, *words = words
        if "=" in word:
            key, value = word.split("=", 1)
        elif words and not words[0].startswith("-"):
            key, value, words = word, words[0], words[1:]
        else:
            key, value = word, ""
        key = SHORT.get(key, key)
        assert key not in found, f"{key} is given twice"
        found[key] = value
    return {key: value for key, value in found.items() if key not in PLUGIN_ONLY}


def requests() -> list[SlurmRequest]:
    return [
        SlurmRequest(nodes, tasks, 4, 90, "gpu", gpus, kind, gpu_type, memory, **extra)
        for (nodes, tasks, gpus), (kind, gpu_type), memory, extra in itertools.product(
            SHAPES, GPU_REQUESTS, MEMORIES, EXTRAS
        )
    ]


def test_sbatch_header_equals_the_plugins_command():
    for request in requests():
        assert options(shlex.split(submitted(request))[1:]) == request.as_sbatch(), request


def test_a_shell_passes_the_plugins_options_to_sbatch_unchanged(tmp_path: Path):
    """The plugin runs its command line in a shell. Options such as --mem''=0 and [a|b]&c must reach sbatch unchanged."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    sbatch.chmod(0o755)
    sample = requests()[:: len(requests()) // 40]
    for request in sample:
        done = subprocess.run(
            submitted(request),
            shell=True,
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        )
        assert options(done.stdout.split("\0")[:-1]) == request.as_sbatch(), request


def test_all_resources_are_keys_that_rules_pass_on():
    for request in requests():
        assert set(request.as_resources()) <= set(RESOURCE_KEYS)


def test_srun_options_cover_the_whole_allocation():
    request = SlurmRequest(4, 8, 12, 60, "gpu", 8, "gpus_per_node")
    assert request.as_srun() == [
        "--nodes=4",
        "--ntasks=32",
        "--ntasks-per-node=8",
        "--cpus-per-task=12",
        "--gpus-per-node=8",
    ]
    typed = SlurmRequest(1, 4, 12, 60, "gpu", 4, "gres", "a100")
    assert typed.as_srun()[-1] == "--gres=gpu:a100:4"
    assert not [
        word for word in SlurmRequest(1, 4, 12, 60, "gpu", 4, "none").as_srun() if "gpu" in word or "gres" in word
    ]


def test_srun_options_equal_the_sbatch_options():
    for request in requests():
        header, step = request.as_sbatch(), dict(word.split("=", 1) for word in request.as_srun())
        for option in set(step) & set(header):
            assert step[option] == header[option], request


@pytest.mark.parametrize(("memory", "expected"), [("per_node", "250000"), ("all", "0"), ("omit", None)])
def test_half_a_node_gets_its_fraction_of_memory_and_cores(tmp_path: Path, memory: str, expected: str | None):
    plan = plan_of(tmp_path, {"stages.0.gpus_per_node": 4}, {"memory": memory})
    header = job_request(plan, JobId("train", ("base",))).as_sbatch()
    assert header.get("--mem") == expected
    assert header["--cpus-per-task"] == "8", "64 cores / 8 GPUs x 4 requested GPUs / 4 tasks"


def test_each_job_gets_the_partition_of_its_kind(tmp_path: Path):
    partitions = {
        "gpu": {"name": "big", "max_minutes": 900},
        "cpu": {"name": "lean", "max_minutes": 100},
        "debug": {"name": "quick", "max_minutes": 15},
    }
    plan = plan_of(tmp_path, {"stages.1.export": "last"}, {"partitions": partitions})
    requested = {str(job): job_request(plan, job) for job in jobs_of(plan) if job.kind != "tokenize"}
    assert {job: request.partition for job, request in requested.items()} == {
        "train-base": "big",
        "train-chat": "big",
        "environment": "quick",
        "fabric": "quick",
        "tokenizer": "lean",
        "export-chat": "lean",
    }
    assert requested["fabric"].minutes == 15, "the time limit of the partition"
    assert requested["tokenizer"].gpus_per_node == 0
    assert (requested["environment"].tasks_per_node, requested["environment"].gpus_per_node) == (1, 1)


def test_the_plugin_reads_all_resource_keys():
    """If the plugin stopped reading a key, submissions would lose it without an error."""
    import snakemake_executor_plugin_slurm
    from snakemake_executor_plugin_slurm import submit_string, utils
    from snakemake_executor_plugin_slurm_jobstep import get_cpu_setting

    modules = [snakemake_executor_plugin_slurm, submit_string, utils]
    text = "".join(Path(str(module.__file__)).read_text() for module in modules)
    text += Path(get_cpu_setting.__code__.co_filename).read_text()
    unread = [key for key in RESOURCE_KEYS if not re.search(rf"resources\.get\(\s*\"{key}\"|resources\.{key}\b", text)]
    assert unread == []


def site(**changes: Any) -> Site:
    """Return a site with 8 GPUs, 64 cores and 500,000 MB per node."""
    node = NodeShape(cpus=64, memory_mb=500_000, gpus=8)
    one_machine = Site(name="centre", scheduler="local", max_nodes=1, cuda_build="cu130", node=node)
    return one_machine.model_copy(update=changes)


PARTITIONS = Partitions(
    gpu=Partition(name="big", max_minutes=900),
    cpu=Partition(name="lean", max_minutes=100),
    debug=Partition(name="quick", max_minutes=15),
)
OPTIONS = {"account": "proj", "qos": "long", "constraint": "ssd", "reservation": "maint", "exclusive": True}


def test_gpu_job_gets_a_share_of_cores_and_memory_and_all_site_options():
    where = site(partitions=PARTITIONS, gpu_request="gres", gpu_type="a100", memory="per_node", **OPTIONS)
    assert gpu_request(where, partition_kind="debug", nodes=3, tasks=2, gpus=4, minutes=90) == SlurmRequest(
        nodes=3,
        tasks_per_node=2,
        cpus_per_task=16,
        minutes=15,
        partition="quick",
        gpus_per_node=4,
        gpu_request="gres",
        gpu_type="a100",
        memory_mb=250_000,
        account="proj",
        qos="long",
        constraint="ssd",
        reservation="maint",
        exclusive=True,
    )


def test_gpu_job_on_a_site_without_gpus_gets_a_core_for_each_rank():
    where = site(node=NodeShape(cpus=4, memory_mb=1000), memory="per_node")
    request = gpu_request(where, partition_kind="gpu", nodes=1, tasks=3, gpus=3, minutes=90)
    assert (request.cpus_per_task, request.gpus_per_node, request.memory_mb) == (1, 0, 750)
    assert (request.partition, request.minutes) == ("", 90)


def test_every_task_gets_at_least_one_core_and_one_megabyte():
    where = site(node=NodeShape(cpus=8, memory_mb=1, gpus=8), memory="per_node")
    request = gpu_request(where, partition_kind="gpu", nodes=1, tasks=8, gpus=4, minutes=1)
    assert (request.cpus_per_task, request.memory_mb) == (1, 1)


def test_a_job_requests_at_most_the_memory_of_a_node():
    request = gpu_request(site(memory="per_node"), partition_kind="gpu", nodes=1, tasks=1, gpus=9, minutes=1)
    assert request.memory_mb == 500_000


def test_cpu_job_gets_all_cores_of_one_node_and_no_gpu():
    where = site(partitions=PARTITIONS, memory="per_node", gpu_request="gpus_per_node", **OPTIONS)
    expected = SlurmRequest(1, 1, 64, 100, "lean", memory_mb=500_000, **OPTIONS)
    assert cpu_request(where, 500) == expected
    assert cpu_request(where, 99) == replace(expected, minutes=99)
    assert cpu_request(site(memory="omit"), 500) == SlurmRequest(1, 1, 64, 500, "")


def test_main_process_gets_one_core_for_as_long_as_its_partition_allows():
    where = site(partitions=PARTITIONS, memory="per_node", **OPTIONS)
    expected = SlurmRequest(1, 1, 1, 100, "lean", memory_mb=2000, **{**OPTIONS, "exclusive": False})
    assert controller_request(where) == expected
    assert controller_request(site(memory="all")).memory_mb == 2000
    assert controller_request(site(memory="omit")) == SlurmRequest(1, 1, 1, 1, "")
    small = site(node=NodeShape(cpus=2, memory_mb=1500), memory="per_node")
    assert controller_request(small).memory_mb == 1500


@pytest.mark.parametrize(("memory_mb", "expected"), [(250_000, 1000), (0, 0), (None, None)])
def test_one_minute_job_is_the_smallest_one_with_the_same_options(memory_mb: int | None, expected: int | None):
    planned = SlurmRequest(4, 8, 16, 900, "big", 8, "gpus_per_node", memory_mb=memory_mb, **OPTIONS)
    smallest = replace(
        planned,
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=1,
        minutes=1,
        partition="lean",
        gpus_per_node=0,
        memory_mb=expected,
        exclusive=False,
    )
    assert one_minute_request(site(partitions=PARTITIONS), planned) == smallest
    assert one_minute_request(site(), planned) == replace(smallest, partition="big")


def test_site_with_one_partition_uses_it_for_all_jobs():
    only = Partitions(gpu=PARTITIONS.gpu)
    assert [partition_for(site(partitions=only), kind) for kind in ("gpu", "cpu", "debug")] == [only.gpu] * 3
    assert [partition_for(site(partitions=PARTITIONS), kind) for kind in ("gpu", "cpu", "debug")] == [
        PARTITIONS.gpu,
        PARTITIONS.cpu,
        PARTITIONS.debug,
    ]
    assert partition_for(site(), "gpu") is None


def test_all_options_are_spelled_as_sbatch_and_as_resources():
    request = SlurmRequest(
        2, 4, 16, 90, "big", 4, "gres", "a100", 1000, **OPTIONS, exclude=("n1", "n2"), after_job="41"
    )
    assert request.as_sbatch() == {
        "--nodes": "2",
        "--ntasks-per-node": "4",
        "--cpus-per-task": "16",
        "--gres": "gpu:a100:4",
        "--mem": "1000",
        "--time": "90",
        "--partition": "big",
        "--account": "proj",
        "--qos": "long",
        "--constraint": "ssd",
        "--reservation": "maint",
        "--exclusive": "",
        "--exclude": "n1,n2",
        "--dependency": "afterany:41",
        "--open-mode": "append",
    }
    assert request.as_resources() == {
        "nodes": 2,
        "gres": "gpu:a100:4",
        "tasks_per_gpu": 0,
        "mpi": "",
        "cpus_per_task": 16,
        "runtime": 90,
        "slurm_partition": "big",
        "slurm_extra": "--ntasks-per-node=4 --open-mode=append --reservation=maint --exclusive --exclude=n1,n2 "
        "--dependency=afterany:41",
        "mem_mb": 1000,
        "slurm_account": "proj",
        "qos": "long",
        "constraint": "ssd",
    }


def test_an_empty_list_of_nodes_overrides_the_plugins_own_list():
    assert str(SlurmRequest(1, 1, 1, 1, "big", exclude=()).as_resources()["slurm_extra"]).endswith(" --exclude=")
    assert "--exclude" not in SlurmRequest(1, 1, 1, 1, "big", exclude=()).as_sbatch()
    assert "--exclude" not in str(SlurmRequest(1, 1, 1, 1, "big").as_resources()["slurm_extra"])
