"""job.sbatch and the sbatch command of Snakemake's Slurm plugin must request the same resources."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string
from snakemake_executor_plugin_slurm.validation import validate_slurm_extra

from longhaul.artifacts.paths import JobId
from longhaul.jobs.kind import job_request, jobs_of
from longhaul.planning.slurm_request import RESOURCE_KEYS, SlurmRequest
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
