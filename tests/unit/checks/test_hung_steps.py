"""A step of the node check that hangs is a row with its GPUs, its limit and a remedy, and the rest of the node is reported."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import EnvironmentReport, failed_path
from longhaul.checks import environment
from longhaul.checks.hung_steps import COMMANDS, GPU_DRIVER, GPUS, HUNG_STEP, KERNEL, OPS, RUN_FOLDER, SCRATCH
from longhaul.checks.node_facts import node_facts
from longhaul.checks.node_problems import node_problems
from longhaul.checks.run_parts_in_child import HungStep, Step, Subject
from longhaul.config.run_config import Checks
from longhaul.errors import BadNodesError
from longhaul.runtime.rendezvous import RENDEZVOUS_TIMEOUT_S
from longhaul.runtime.swap_folders import swap_root
from tests.support.healthy_node_facts import environment_job, two_gpu_nodes

_NODE_WITH_HUNG_PARTS = """
import sys, time
from dataclasses import replace
from functools import partial
from pathlib import Path

from longhaul.checks import hung_steps

for subject in ("GPUS", "COMMANDS", "SCRATCH"):  # before other modules import them
    setattr(hung_steps, subject, replace(getattr(hung_steps, subject), limit_s=1.5))

import torch
from longhaul.checks import environment, gpu_pair_copies, node_facts, node_measurements
from longhaul.jobs.kinds.environment_job import EnvironmentSpec

def copy(to, source):
    time.sleep(600 if stuck else 0.001)
    return 0.001

def hang_at_second_pair(*arguments):
    global stuck
    stuck = copied[0] == 1
    copied[0] += 1
    return measure_pair(*arguments)

copied, stuck, measure_pair = [0], False, gpu_pair_copies._measure_pair
gpu_pair_copies._measure_pair = hang_at_second_pair
node_measurements._GPU_NODE = node_measurements._Sizes(64, 4096, 4096, 4096, 2**22, 4096)
node_measurements._gpus = lambda: [torch.device("cpu")] * 4
node_measurements.matrix_tflops = lambda device: 1.0
node_measurements.copy_between_gpus = partial(gpu_pair_copies.copy_between_gpus, copy=copy)
node_facts.gpus = lambda: [
    {"name": "H", "uuid": str(n), "pci_address": f"0000:0{n}:00.0", "memory_bytes": 2**30} for n in range(4)
]
environment.run(EnvironmentSpec.read(Path(sys.argv[1])))
"""


_NODE_WITH_HUNG_FOLDER = """
import os, sys
from dataclasses import replace
from pathlib import Path

from longhaul.checks import hung_steps

hung_steps.RUN_FOLDER = replace(hung_steps.RUN_FOLDER, limit_s=1.5)

from longhaul.checks import environment, node_facts
from longhaul.jobs.kinds.environment_job import EnvironmentSpec

if os.environ["RANK"] == "1":
    # A FIFO that nobody writes to
    node_facts.os.fsync = node_facts.Path.touch = lambda *arguments: os.open(sys.argv[2], os.O_RDONLY)
environment.run(EnvironmentSpec.read(Path(sys.argv[1])))
"""


def stub(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_hung_copy_command_and_disk_are_named_and_the_rest_of_the_node_is_reported(tmp_path: Path):
    """CPUs stand for four GPUs. Another process holds the lock of storage.scratch, as one that waits for a dead disk."""
    paths = {
        "folder": str(tmp_path / "results"),
        "job_folder": str(tmp_path),
        "out": str(tmp_path / "environment.json"),
    }
    job = environment_job(nodes=1, gpus_per_node=4, build="cuda 13.0", measures_speed=True, swap_bytes=1, scratch=str(tmp_path),
                          checks=Checks(min_disk_free_gb=0.001, burn_in_s=0.1), **paths)  # fmt: skip
    job.write(tmp_path / "job.json")
    stub(tmp_path / "bin", "nvidia-smi", "exec sleep 600")
    handle = os.open(swap_root(str(tmp_path)), os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "-c", _NODE_WITH_HUNG_PARTS, str(tmp_path / "job.json")],
            env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
            capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip
    finally:
        os.close(handle)
    assert done.returncode == 1, done.stderr
    report = EnvironmentReport.read(failed_path(tmp_path / "environment.json"))
    hung = [row for row in report.checks if row["check"] == HUNG_STEP]
    pair, command, disk = hung
    assert pair["component"] == "GPU 1 (PCI 0000:01:00.0) <-> GPU 2 (PCI 0000:02:00.0)"
    assert (
        pair["value"].startswith("copies between two GPUs: no end after 1.5")
        and pair["expected"] == "an end within 1.5 s"
    )
    assert pair["remedy"] == GPUS.remedy and pair["value"].endswith(" s, the limit is 1.5 s")
    assert command["value"].startswith(f"command {tmp_path / 'bin' / 'nvidia-smi'} --query-gpu=driver_version")
    assert disk["value"].startswith(f"folders of offloaded states in {tmp_path}: no end after 1.5")
    values = {row["check"]: row["value"] for row in report.checks}
    assert values["products with a known result"].startswith("0 wrong rows") and "memory bandwidth (triad)" in values
    assert "write, fsync, rename, read in the run folder" in values and "slowest core of the job" in values
    assert not [line for line in report.problems if "driver" in line.split(";")[0] and "not the same" in line]


def test_node_whose_run_folder_hangs_is_excluded_by_the_other_one(tmp_path: Path):
    """Nodes do not look for each other's files then: that would hang, too."""
    os.mkfifo(tmp_path / "mount")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = {
        "folder": str(tmp_path / "results"),
        "job_folder": str(tmp_path),
        "out": str(tmp_path / "environment.json"),
    }
    job = environment_job(nodes=2, gpus_per_node=1, build="cpu", interconnect="none", socket_interface=None,
                          scratch=str(tmp_path), checks=Checks(min_disk_free_gb=0.001), **paths)  # fmt: skip
    job.write(tmp_path / "job.json")
    command = [sys.executable, "-c", _NODE_WITH_HUNG_FOLDER, str(tmp_path / "job.json"), str(tmp_path / "mount")]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
              "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    nodes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, **shared, "RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"})
        for rank in (0, 1)
    ]  # fmt: skip
    printed, errors = zip(*(node.communicate(timeout=200) for node in nodes), strict=True)
    assert [node.returncode for node in nodes] == [1, 0] and "longhaul.errors.BadNodesError" in errors[0], errors
    assert f"  - n1: {HUNG_STEP}: free space of {tmp_path / 'results'}, and a write: no end after 1.5" in errors[0]
    assert printed[1].startswith(f"n1: free space of {tmp_path / 'results'}, and a write: no end after 1.5")
    assert RUN_FOLDER.remedy in errors[0] and "first node" not in errors[0]


def hung(subject: Subject, *gpus: int) -> HungStep:
    return HungStep(Step("a step", subject, gpus), "no end after 9 s, the limit is 9 s")


LOST: dict[str, tuple[Subject, Callable[[dict[str, Any]], object]]] = {
    "no GPUs": (GPUS, lambda node: node.update(gpus=[], gpu_names=["CPU"])),
    "no hardware": (KERNEL, lambda node: node.update(hardware=None)),
    "no driver": (COMMANDS, lambda node: node["versions"].pop("driver")),
    "no run folder": (
        RUN_FOLDER,
        lambda node: [node.pop("run_folder_seen_after_s"), node.pop("own_file_seen_after_s")],
    ),
}


@pytest.mark.parametrize(("subject", "lose"), LOST.values(), ids=LOST)
def test_facts_that_a_hung_step_hides_are_no_problems_of_their_own(
    tmp_path: Path, subject: Subject, lose: Callable[[dict[str, Any]], object]
):
    """Also where failed hardware is tolerated: a training would hang."""
    nodes = [{**node, "cpus": 96, "measured": None, "gpu_names": [f"GPU {index}" for index in range(8)]}
             for node in two_gpu_nodes()]  # fmt: skip
    nodes[1]["hung"] = [hung(subject)]
    lose(nodes[1])
    job = environment_job(nodes=2, checks=Checks(min_disk_free_gb=0.001, bad_hardware="warn"), job_folder=str(tmp_path),
                          out=str(tmp_path / "environment.json"))  # fmt: skip
    assert node_problems(nodes, job) == []
    with pytest.raises(BadNodesError) as raised:
        environment._judge(nodes, job)
    line = f"n2: {HUNG_STEP}: a step: no end after 9 s, the limit is 9 s, expected an end within {subject.limit_s:g} s"
    assert list(raised.value.nodes) == ["n2"] and f"  - {line}; {subject.remedy}" in raised.value.message
    assert raised.value.message.count("  - ") == 1


def test_node_without_any_result_has_facts(tmp_path: Path):
    facts = node_facts("n1", environment_job(measures_speed=True), {}, [hung(replace(KERNEL, limit_s=1.0))])
    assert facts["gpus"] == [] and facts["versions"] == {} and facts["hardware"] is None
    assert facts["measured"] is not None and facts["measured"].devices == []


def test_other_nodes_wait_longer_than_any_step_of_this_check():
    """Else the rendezvous would end before the node could report its step."""
    subjects = (GPUS, GPU_DRIVER, RUN_FOLDER, SCRATCH, OPS, KERNEL, COMMANDS)
    assert max(one.limit_s for one in subjects) <= environment._LATEST_S - RENDEZVOUS_TIMEOUT_S


_FIRST_NODE_WITHOUT_FOLDER = """
import sys, time
from dataclasses import replace
from pathlib import Path

from longhaul.checks import hung_steps

hung_steps.RUN_FOLDER = replace(hung_steps.RUN_FOLDER, limit_s=1.0)

from longhaul.checks import environment
from longhaul.jobs.kinds.environment_job import EnvironmentSpec
from longhaul.runtime.process_rank import this_rank

environment._write_in_time(this_rank(), EnvironmentSpec.read(Path(sys.argv[1])), lambda: time.sleep(600))
"""


def test_first_node_that_cannot_write_the_report_says_so_and_ends(tmp_path: Path):
    environment_job(out=str(tmp_path / "environment.json")).write(tmp_path / "job.json")
    command = [sys.executable, "-c", _FIRST_NODE_WITHOUT_FOLDER, str(tmp_path / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 2
    assert f": writing {tmp_path / 'environment.json'}: no answer within 1 s; {RUN_FOLDER.remedy}" in done.stderr
