"""job.sbatch and the sbatch command of Snakemake's Slurm plugin must request the same resources."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string
from snakemake_executor_plugin_slurm.validation import validate_slurm_extra

from longhaul.artifacts.paths import JobId
from longhaul.config.partition_config import JobPlace, NodeShape, Partition
from longhaul.config.site_config import Site
from longhaul.config.software_config import Accelerator
from longhaul.jobs.job_kind import job_request, jobs_of
from longhaul.jobs.kinds.count_chats_job import COUNT_CHATS
from longhaul.jobs.kinds.tokenizer_job import LOAD_TOKENIZER
from longhaul.planning.slurm_request import (
    RESOURCE_KEYS,
    SlurmRequest,
    controller_request,
    cpu_request,
    gpu_request,
    one_minute_request,
)
from longhaul.report.ended_jobs import EndedJob, how_it_ended
from longhaul.report.search_logs import match_line
from tests.support.small_configs import plan_of

SHORT = {"-t": "--time", "-p": "--partition", "-A": "--account", "-C": "--constraint", "-D": "--chdir"}
PLUGIN_ONLY = {"--job-name", "--output", "--export", "--comment", "--parsable", "--chdir"}

SHAPES = [(1, 1, 0), (1, 1, 1), (1, 8, 8), (2, 1, 8), (2, 8, 8), (4, 8, 8), (64, 8, 8), (3, 5, 4)]
GPU_REQUESTS = [
    ("gpus_per_node", None),
    ("gpus_per_node", "a100"),
    ("gres", None),
    ("gres", "rtx-3090-J"),
    ("none", None),
]
MEMORIES = [None, 0, 123_456]
EXTRAS = [
    {},
    {"account": "proj-1", "qos": "long", "constraint": "[rack1|rack2]&ssd"},
    {"reservation": "maint_1", "exclusive": True, "gres": ("nvme:100", "craynetwork:0")},
    {"threads_per_core": 1, "extra": ("--mail-user=a.b@c.de", "--licenses=scratch:1,home", "--use-min-nodes")},
    {
        "reservation": "course-JSC",
        "extra": ("--mail-user=Karl-Josef@uni-d.de", "--licenses=scratch-c"),
        "exclude": ("gpu-p",),
    },
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
        "partition": f"-p {shlex.quote(request.partition)}" if request.partition else "",
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
        SlurmRequest(nodes, tasks, 4, 90, "gpu", gpus, kind, gpu_type, memory_mb=memory, **extra)
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


# Words that a site file accepts, rich in what looks like an option: a dash and a letter, or the name of one after dashes.
_PARTS = st.sampled_from(
    ["-", "--", *"aJopcntDACN0.,:@%/+=_", "mem=", "gres=", "job-name=", "parsable", "export=", "gpus="]
)
words = st.lists(_PARTS, max_size=12).map(lambda parts: "w" + "".join(parts))


@given(reservation=words, mail=words, gpu_type=words, gres=words, nodes=st.lists(words, min_size=1, max_size=3))
def test_names_that_look_like_options_pass_the_plugins_check_and_reach_sbatch_unchanged(
    reservation: str, mail: str, gpu_type: str, gres: str, nodes: list[str]
):
    for kind in ("gpus_per_node", "gres"):
        request = SlurmRequest(2, 4, 4, 90, "gpu", 4, kind, gpu_type, (gres,), 0, reservation=reservation)
        request = replace(request, extra=(f"--mail-user={mail}", "--nice"), exclude=tuple(nodes))
        assert options(shlex.split(submitted(request))[1:]) == request.as_sbatch()


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
            assert step[option] == header[option].removesuffix(",nvme:100,craynetwork:0"), request


@pytest.mark.parametrize(("memory", "expected"), [("per_node", "250000"), ("all", "0"), ("omit", None)])
def test_half_a_node_gets_its_fraction_of_memory_and_cores(tmp_path: Path, memory: str, expected: str | None):
    plan = plan_of(tmp_path, {"stages.0.gpus_per_node": 4}, {"partitions.0.memory": memory})
    header = job_request(plan, JobId("train", ("base",))).as_sbatch()
    assert header.get("--mem") == expected
    assert header["--cpus-per-task"] == "8", "64 cores / 8 GPUs x 4 requested GPUs / 4 tasks"


def test_each_job_gets_the_partition_of_its_kind(tmp_path: Path):
    gpus, cores = {"cpus": 64, "memory_mb": 500_000, "gpus": 8}, {"cpus": 12, "memory_mb": 3000}
    partitions = [
        {"jobs": ["gpu"], "name": "big", "max_minutes": 900, "max_nodes": 2, "node": gpus},
        {"jobs": ["cpu"], "name": "lean", "max_minutes": 100, "node": cores},
        {"jobs": ["debug"], "name": "quick", "max_minutes": 15, "node": gpus},
    ]
    plan = plan_of(tmp_path, {"stages.1.export": "last"}, {"partitions": partitions})
    requested = {str(job): job_request(plan, job) for job in jobs_of(plan) if job.kind != "tokenize"}
    assert {job: request.partition for job, request in requested.items()} == {
        "train-base": "big",
        "train-chat": "big",
        "environment": "quick",
        "fabric": "quick",
        "tokenizer": "lean",
        "count_chats-chats": "lean",
        "export-chat": "lean",
    }
    assert requested["fabric"].minutes == 15, "the time limit of the partition"
    tokenizer = requested["tokenizer"]
    assert (tokenizer.gpus_per_node, tokenizer.cpus_per_task, tokenizer.memory_mb) == (0, 12, 3000)
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


GPU_NODE = NodeShape(cpus=64, memory_mb=500_000, gpus=8)
GPU_OPTIONS: dict[str, Any] = {
    "account": "proj@gpu",
    "qos": "long",
    "constraint": "ssd",
    "reservation": "maint",
    "exclusive": True,
    "threads_per_core": 1,
}
CPU_OPTIONS: dict[str, Any] = {"account": "proj@cpu", "qos": "cores"}
GPU = Partition(
    jobs=("gpu",),
    name="big",
    max_minutes=900,
    max_nodes=16,
    node=GPU_NODE,
    gpu_request="gres",
    gpu_type="a100",
    gres_extra=("nvme:100",),
    sbatch_extra=("--mail-type=END",),
    **GPU_OPTIONS,
)
CPU = Partition(jobs=("cpu",), name="lean", max_minutes=100, node=NodeShape(cpus=40, memory_mb=150_000), **CPU_OPTIONS)
DEBUG = Partition(jobs=("debug",), name="quick", max_minutes=15, node=GPU_NODE)
LOGIN = Partition(jobs=("login",), name="front", max_minutes=2000, node=NodeShape(cpus=4, memory_mb=1500))


def site(*partitions: Partition, scheduler: Literal["slurm", "local"] = "slurm") -> Site:
    accelerator = Accelerator(cuda="13.0" if partitions[0].node.gpus else None)
    return Site(name="centre", scheduler=scheduler, partitions=partitions, accelerator=accelerator)


def shared(**changes: Any) -> Partition:
    """Return a GPU partition whose jobs may share nodes, without further options."""
    options = {
        "exclusive": False,
        "gpu_request": "gpus_per_node",
        "gpu_type": None,
        "gres_extra": (),
        "sbatch_extra": (),
    }
    none = dict.fromkeys(("account", "qos", "constraint", "reservation", "threads_per_core"))
    return GPU.model_copy(update={**none, **options, **changes})


def test_gpu_job_gets_a_share_of_cores_and_memory_and_all_options_of_its_partition():
    where = site(GPU.model_copy(update={"jobs": ("gpu", "debug")}), CPU)
    expected = SlurmRequest(
        nodes=3,
        tasks_per_node=2,
        cpus_per_task=16,
        minutes=90,
        partition="big",
        gpus_per_node=4,
        gpu_request="gres",
        gpu_type="a100",
        gres=("nvme:100",),
        memory_mb=250_000,
        extra=("--mail-type=END",),
        **GPU_OPTIONS,
    )
    for place in ("gpu", "debug"):
        assert gpu_request(where, place=place, nodes=3, tasks=2, gpus=4, minutes=90) == expected
    assert gpu_request(where, place="gpu", nodes=1, tasks=2, gpus=4, minutes=901).minutes == 900


def test_gpu_job_on_a_site_without_gpus_gets_a_core_for_each_rank():
    where = site(shared(name=None, node=NodeShape(cpus=4, memory_mb=1000)))
    request = gpu_request(where, place="gpu", nodes=1, tasks=3, gpus=3, minutes=90)
    assert (request.cpus_per_task, request.gpus_per_node, request.memory_mb) == (1, 0, 750)
    assert request.partition is None and "--partition" not in request.as_sbatch()


def test_every_task_gets_at_least_one_core_and_one_megabyte():
    where = site(shared(node=NodeShape(cpus=8, memory_mb=1, gpus=8)))
    request = gpu_request(where, place="gpu", nodes=1, tasks=8, gpus=4, minutes=1)
    assert (request.cpus_per_task, request.memory_mb) == (1, 1)


def test_a_job_requests_at_most_a_node():
    request = gpu_request(site(shared()), place="gpu", nodes=1, tasks=1, gpus=9, minutes=1)
    assert (request.memory_mb, request.cpus_per_task) == (500_000, 64)


def test_cpu_job_gets_the_node_and_the_options_of_its_own_partition():
    expected = SlurmRequest(1, 1, 40, 100, "lean", gpu_request="gpus_per_node", memory_mb=150_000, **CPU_OPTIONS)
    assert cpu_request(site(GPU, CPU), 500) == expected
    assert cpu_request(site(GPU, CPU), 99) == replace(expected, minutes=99)
    header = expected.as_sbatch()
    assert not {"--constraint", "--reservation", "--exclusive", "--gres", "--gpus-per-node"} & set(header)


def test_cpu_job_with_few_cores_asks_for_these_and_their_memory():
    request = cpu_request(site(GPU, CPU), 500, COUNT_CHATS)
    assert request == replace(cpu_request(site(GPU, CPU), 500), cpus_per_task=2, memory_mb=4000)
    small = CPU.model_copy(update={"node": NodeShape(cpus=1, memory_mb=3000), "memory": "all"})
    assert cpu_request(site(GPU, small), 9, COUNT_CHATS).as_sbatch().items() >= {
        ("--cpus-per-task", "1"),
        ("--mem", "3000"),
    }


def test_cpu_job_with_few_cores_gets_cores_for_its_memory_where_no_job_names_its_memory():
    dense = CPU.model_copy(update={"node": NodeShape(cpus=48, memory_mb=90_000), "memory": "omit"})
    request = cpu_request(site(GPU, dense), 9, LOAD_TOKENIZER)
    assert (request.cpus_per_task, request.memory_mb) == (3, None), "4000 MiB at 1875 MiB per core"


def test_cpu_job_with_few_cores_gets_a_whole_node_where_jobs_get_only_whole_nodes():
    whole = CPU.model_copy(update={"exclusive": True})
    assert cpu_request(site(GPU, whole), 9, COUNT_CHATS) == cpu_request(site(GPU, whole), 9)
    for shares in (site(shared()), site(GPU)):
        assert cpu_request(shares, 9, COUNT_CHATS) == cpu_request(shares, 9), "on a GPU partition a share, as others"


def test_a_cpu_job_with_few_cores_gets_more_memory_as_doctor_says():
    larger = CPU.model_copy(update={"node": CPU.node.model_copy(update={"memory_mb": 2 * CPU.node.memory_mb})})
    few, after = (cpu_request(site(GPU, partition), 9, LOAD_TOKENIZER) for partition in (CPU, larger))
    assert few.memory_mb == after.memory_mb, "memory_mb of the site file changes nothing"
    problem = match_line("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.")
    for remedy in (problem and problem["remedy"], how_it_ended("7", EndedJob("OUT_OF_MEMORY", "0:125", "", "", ""))[1]):
        assert remedy and "site file (exclusive: true for a CPU job of few cores)" in remedy
    whole = cpu_request(site(GPU, CPU.model_copy(update={"exclusive": True})), 9, LOAD_TOKENIZER)
    assert whole.memory_mb == CPU.node.memory_mb and whole.exclusive


def test_only_jobs_that_use_many_cores_ask_for_a_whole_cpu_node(tmp_path: Path):
    mixture = {"datasets.both": {"kind": "text", "mixture": {"prose": 1}}, "stages.0.dataset": "both"}
    config = {"site": "slurm-generic", **mixture, "data_jobs.prose": 2, "stages.0.export": "last"}
    plan = plan_of(tmp_path, config)
    requests = {job: job_request(plan, job) for job in jobs_of(plan)}
    shapes = {
        str(job): (request.cpus_per_task, request.memory_mb)
        for job, request in requests.items()
        if request.partition == "cpu"
    }
    few = {"tokenize-both": (1, 2000), "count_chats-chats": (2, 4000)}
    encode = {f"encode-prose-{number}-of-2" for number in (1, 2)}
    many = {"tokenizer", "index_sources-prose", *encode, "tokenize-prose", "tokenize-chats", "export-base"}
    assert shapes == {**few, **dict.fromkeys(many, (64, 240_000))}


def test_a_tokenizer_that_is_only_loaded_needs_one_core(tmp_path: Path):
    plan = plan_of(tmp_path, {"site": "slurm-generic", "tokenizer": {"hub": {"id": "org/model"}}})
    assert job_request(plan, JobId("tokenizer")) == cpu_request(plan.site, 120, LOAD_TOKENIZER)


def test_cpu_job_without_a_partition_gets_the_share_of_one_gpu():
    request = cpu_request(site(shared(account="proj")), 90)
    assert request == SlurmRequest(1, 1, 8, 90, "big", 1, "gpus_per_node", memory_mb=62_500, account="proj")


def test_cpu_job_without_a_partition_gets_a_whole_node_where_jobs_get_only_whole_nodes():
    request = cpu_request(site(GPU), 90)
    assert (request.gpus_per_node, request.cpus_per_task, request.memory_mb) == (8, 64, 500_000)
    assert request.exclusive and request.as_sbatch()["--gres"] == "gpu:a100:8,nvme:100"


def test_cpu_job_on_this_machine_gets_all_cores_and_no_gpu():
    request = cpu_request(site(shared(max_minutes=None, max_nodes=1), scheduler="local"), 90)
    assert (request.gpus_per_node, request.cpus_per_task, request.minutes) == (0, 64, 90)


def test_main_process_gets_one_core_for_as_long_as_its_partition_allows():
    login = SlurmRequest(1, 1, 1, 2000, "front", gpu_request="gpus_per_node", memory_mb=1500)
    assert controller_request(site(GPU, CPU, LOGIN)) == login
    cpu = SlurmRequest(1, 1, 1, 100, "lean", gpu_request="gpus_per_node", memory_mb=2000, **CPU_OPTIONS)
    assert controller_request(site(GPU, CPU)) == cpu
    assert controller_request(site(GPU, CPU.model_copy(update={"memory": "all"}))) == cpu
    assert controller_request(site(GPU, CPU.model_copy(update={"memory": "omit"}))).memory_mb is None


def test_main_process_gets_a_share_of_a_gpu_node_as_other_cpu_jobs_do():
    """Centres refuse jobs without a GPU on GPU partitions."""
    where = site(shared())
    request = controller_request(where)
    assert (request.gpus_per_node, request.cpus_per_task, request.memory_mb, request.minutes) == (1, 8, 62_500, 900)
    assert request == cpu_request(where, 900)


def test_one_minute_job_is_the_smallest_one_that_the_cpu_partition_accepts():
    cpu = SlurmRequest(1, 1, 1, 1, "lean", gpu_request="gpus_per_node", memory_mb=1000, **CPU_OPTIONS)
    assert one_minute_request(site(GPU, CPU)) == cpu
    whole = CPU.model_copy(update={"exclusive": True, "memory": "all"})
    assert one_minute_request(site(GPU, whole)) == cpu
    assert one_minute_request(site(GPU, CPU.model_copy(update={"memory": "omit"}))).memory_mb is None
    assert one_minute_request(site(shared())) == cpu_request(site(shared()), 1)


def test_kinds_of_jobs_without_a_partition_use_another_one():
    kinds: list[JobPlace] = ["gpu", "cpu", "debug", "login"]
    assert [site(GPU).partition_for(kind) for kind in kinds] == [GPU] * 4
    assert [site(GPU, CPU).partition_for(kind) for kind in kinds] == [GPU, CPU, GPU, CPU]
    assert [site(GPU, CPU, DEBUG, LOGIN).partition_for(kind) for kind in kinds] == [GPU, CPU, DEBUG, LOGIN]


def test_all_options_are_spelled_as_sbatch_and_as_resources():
    request = SlurmRequest(
        2,
        4,
        16,
        90,
        "big",
        4,
        "gres",
        "a100",
        ("nvme:100",),
        1000,
        **GPU_OPTIONS,
        extra=("--mail-type=END", "--use-min-nodes"),
        exclude=("n1", "n2"),
        after_job="41",
    )
    assert request.as_sbatch() == {
        "--nodes": "2",
        "--ntasks": "8",
        "--ntasks-per-node": "4",
        "--cpus-per-task": "16",
        "--threads-per-core": "1",
        "--gres": "gpu:a100:4,nvme:100",
        "--mem": "1000",
        "--time": "90",
        "--partition": "big",
        "--account": "proj@gpu",
        "--qos": "long",
        "--constraint": "ssd",
        "--reservation": "maint",
        "--exclusive": "",
        "--exclude": "n1,n2",
        "--dependency": "afterany:41",
        "--open-mode": "append",
        "--mail-type": "END",
        "--use-min-nodes": "",
    }
    assert request.as_resources() == {
        "nodes": 2,
        "tasks": 8,
        "mpi": "",
        "cpus_per_task": 16,
        "runtime": 90,
        "slurm_partition": "big",
        "slurm_extra": "--ntasks-per-node=4 --open-mode=append --gres''=gpu:a100:4,nvme:100 --threads-per-core=1 "
        "--reservation=maint --exclusive --mail-type=END --use-min-nodes --exclude=n1,n2 --dependency=afterany:41",
        "mem_mb": 1000,
        "slurm_account": "proj@gpu",
        "qos": "long",
        "constraint": "ssd",
    }


def test_an_empty_list_of_nodes_overrides_the_plugins_own_list():
    assert str(SlurmRequest(1, 1, 1, 1, "big", exclude=()).as_resources()["slurm_extra"]).endswith(" --exclude=")
    assert "--exclude" not in SlurmRequest(1, 1, 1, 1, "big", exclude=()).as_sbatch()
    assert "--exclude" not in str(SlurmRequest(1, 1, 1, 1, "big").as_resources()["slurm_extra"])
