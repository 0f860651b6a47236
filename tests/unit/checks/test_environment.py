"""The node check: facts of this machine, what is judged of many, locks of killed builds."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from longhaul.artifacts.schemas import EnvironmentReport, failed_path
from longhaul.checks import environment as check
from longhaul.checks.node_facts import compiler, cuda_build, node_facts, rdma_ports, write_error
from longhaul.checks.node_problems import problems, warnings
from longhaul.config.run_config import Checks
from longhaul.errors import UserError
from longhaul.jobs.specs import EnvironmentSpec
from longhaul.runtime.compiled_ops import clear_stale_locks, ops_folder, use_ops_folder


def job(folder: Path, **changes: Any) -> EnvironmentSpec:
    settings: dict[str, Any] = {
        "run": "r",
        "nodes": 1,
        "gpus_per_node": 8,
        "checks": Checks(min_disk_free_gb=0.001),
        "memory_mb": 100,
        "interconnect": "infiniband",
        "cuda_build": "cpu",
        "scratch": str(folder / "scratch"),
        "prebuild_ops": (),
        "swap_bytes": 0,
        "locked_bytes": 0,
        "folder": str(folder / "results"),
        "out": str(folder / "environment.json"),
    }
    return EnvironmentSpec(**{**settings, **changes})


def nodes() -> list[dict[str, Any]]:
    """Two GPU nodes on which all is well."""
    gpu = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 2**30}
    versions = {
        "python": "3.11.7",
        "torch": "2.13.0+cu130",
        "deepspeed": "0.19.8",
        "cuda_build": "cu130",
        "driver": "590.1",
    }
    node = {
        "versions": versions,
        "memory_bytes": 512 * 2**30,
        "rdma_ports": ["InfiniBand"] * 4 + ["Ethernet"],
        "gpus": [gpu] * 8,
        "disk_free_bytes": 50 * 10**9,
        "shared_memory_bytes": 2**33,
        "write_error": None,
        "sees_run_folder": True,
        "clock_skew_s": 0.0,
        "compiler": "c++ 12",
        "ops": {"cleared": [], "built": {}, "failed": {}},
        "swap": {"folder": "/local", "cleared": [], "free_bytes": 10**12, "lockable_bytes": None, "error": None},
    }
    return [{**copy.deepcopy(node), "host": host} for host in ("n1", "n2")]


def test_good_nodes_have_no_problem(tmp_path: Path):
    assert problems(nodes(), job(tmp_path, cuda_build="cu130")) == []
    assert warnings(nodes(), check.tested_versions()) == []


Change = Callable[[dict[str, Any]], object]
BAD: dict[str, tuple[Change, str]] = {
    "another torch": (
        lambda node: node["versions"].update(torch="2.12.0"),
        "torch is not the same on all nodes: 2.13.0+cu130 on n1; 2.12.0 on n2",
    ),
    "another driver": (lambda node: node["versions"].update(driver="570"), "driver is not the same on all nodes"),
    "a build without CUDA": (
        lambda node: node["versions"].update(cuda_build="cpu"),
        "n2: torch is a cpu build, the site file says cuda_build: cu130",
    ),
    "no DeepSpeed": (lambda node: node["versions"].update(deepspeed=None), "n2: deepspeed is not installed"),
    "a lost GPU": (
        lambda node: node["gpus"].pop(),
        "n2: torch can use 7 GPUs, 8 are needed (driver: 590.1)",
    ),
    "less memory than the plan counts on": (
        lambda node: node.update(memory_bytes=99 * 2**20),
        "n2: the node has 99 MiB of memory, the site file says node.memory_mb: 100",
    ),
    "no InfiniBand": (
        lambda node: node.update(rdma_ports=["Ethernet"]),
        "n2: no active InfiniBand port in /sys/class/infiniband, the site file says interconnect.kind: infiniband",
    ),
    "a port that is down": (
        lambda node: node["rdma_ports"].remove("InfiniBand"),
        "number of active InfiniBand ports is not the same on all nodes: 4 on n1; 3 on n2",
    ),
    "a full disk": (
        lambda node: node.update(disk_free_bytes=10**5),
        "0.0 GB free, checks.min_disk_free_gb asks for 0.001",
    ),
    "an unwritable folder": (lambda node: node.update(write_error="Read-only file system"), "n2: cannot write to"),
    "a folder of its own": (lambda node: node.update(sees_run_folder=False), "must be on a shared file system"),
    "a wrong clock": (
        lambda node: node.update(clock_skew_s=-7.25),
        "n2: clock is -7.2 s from that of n1, checks.max_clock_skew_s allows 5",
    ),
    "no compiler": (lambda node: node.update(compiler=None), "n2: no C++ compiler"),
    "an op that does not build": (
        lambda node: node["ops"]["failed"].update(cpu_adam="omp.h: No such file"),
        "n2: DeepSpeed's cpu_adam does not build: omp.h: No such file",
    ),
    "no libaio": (
        lambda node: node["ops"]["failed"].update(async_io="Unable to JIT load the async_io op"),
        "n2: DeepSpeed's async_io does not build: Unable to JIT load the async_io op; it needs libaio with its headers",
    ),
    "too small a disk for optimizer states": (
        lambda node: node["swap"].update(free_bytes=10**9),
        "n2: storage.scratch /local has 1.0 GB free; what this node's ranks offload takes 2.5 GB",
    ),
    "a scratch folder in memory": (
        lambda node: node["swap"].update(error="Invalid argument"),
        "n2: storage.scratch /local takes no unbuffered writes (Invalid argument), as offloading to nvme makes them",
    ),
    "little memory that may be locked": (
        lambda node: node["swap"].update(lockable_bytes=8 * 2**20),
        "n2: a process may lock 0.008 GB of memory (ulimit -l); offloading to nvme locks 0.100 GB in each",
    ),
}


@pytest.mark.parametrize(("change", "says"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_named_with_its_node(tmp_path: Path, change: Change, says: str):
    found = nodes()
    change(found[1])
    swapping = {"prebuild_ops": ("cpu_adam",), "swap_bytes": 2_500_000_000, "locked_bytes": 10**8}
    text = "\n".join(problems(found, job(tmp_path, cuda_build="cu130", **swapping)))
    assert says in text


def test_what_is_worth_a_look(tmp_path: Path):
    found = nodes()
    for node in found:
        node["versions"]["deepspeed"] = "0.18.0"
    found[1]["shared_memory_bytes"] = 2**20
    found[1]["memory_bytes"] = 448 * 2**30
    found[1]["ops"]["cleared"] = ["cpu_adam"]
    found[1]["swap"]["cleared"] = ["run-base-rank-00003-x"]
    said = warnings(found, check.tested_versions())
    assert said[0].startswith("deepspeed 0.18.0 is installed; longhaul is tested with ")
    assert said[1].startswith("n2: /dev/shm has 1 MiB free") and "cpu_adam" in said[3]
    assert said[4] == "n2: removed the optimizer states that killed ranks left: run-base-rank-00003-x"
    assert said[2] == "n2: 448.0 GiB of memory, another node has 512.0 GiB"


def test_what_a_kernel_keeps_is_no_missing_memory(tmp_path: Path):
    found = nodes()
    found[1]["memory_bytes"] -= 2**30
    assert warnings(found, check.tested_versions()) == []


def test_ports_that_nobody_speaks_of_are_not_judged(tmp_path: Path):
    found = nodes()
    found[1]["rdma_ports"] = []
    for kind in ("roce", "infiniband"):
        assert problems(found, job(tmp_path, cuda_build="cu130", interconnect=kind))
        assert problems(found[1:], job(tmp_path, cuda_build="cu130", interconnect=kind)) == [], (
            "one node talks to nobody"
        )
    assert problems(found, job(tmp_path, cuda_build="cu130", interconnect="ethernet")) == []


def test_active_ports_are_the_kernels(tmp_path: Path):
    for device, state, layer in (("mlx5_0", "4: ACTIVE", "InfiniBand"), ("mlx5_1", "1: DOWN", "InfiniBand"),
                                 ("mlx5_2", "4: ACTIVE", "Ethernet")):  # fmt: skip
        port = tmp_path / device / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "link_layer").write_text(f"{layer}\n")
    assert rdma_ports(tmp_path) == ["InfiniBand", "Ethernet"]
    assert rdma_ports(tmp_path / "none") == []


def test_facts_of_this_machine(tmp_path: Path):
    facts = node_facts("here", tmp_path / "not" / "yet")
    assert facts["cpus"] == len(os.sched_getaffinity(0))
    assert facts["memory_bytes"] == psutil.virtual_memory().total
    assert facts["versions"]["torch"].startswith(check.tested_versions()["torch"])
    assert facts["write_error"] is None and (tmp_path / "not" / "yet").is_dir()
    assert list((tmp_path / "not" / "yet").iterdir()) == []


def test_a_folder_that_cannot_be_written_says_why(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert write_error(tmp_path / "file") == "File exists"
    assert write_error(tmp_path / "file" / "below") == "Not a directory"


def test_builds_are_named_as_wheels_are():
    assert (cuda_build("13.0"), cuda_build("12.8"), cuda_build(None)) == ("cu130", "cu128", "cpu")


def test_a_compiler_that_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler() is None


def run(job: EnvironmentSpec, folder: Path) -> subprocess.CompletedProcess[str]:
    job.write(folder / "job.json")
    command = [sys.executable, "-m", "longhaul", "environment", str(folder / "job.json")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_bad_machine_stops_the_run_and_leaves_the_evidence(tmp_path: Path):
    done = run(job(tmp_path, checks=Checks(min_disk_free_gb=1e9), swap_bytes=10**18), tmp_path)
    assert done.returncode == 2 and "checks.min_disk_free_gb asks for 1e+09" in done.stderr, done.stderr
    assert "what this node's ranks offload takes 1000000000.0 GB" in done.stderr
    assert not (tmp_path / "environment.json").exists()
    assert len(EnvironmentReport.read(failed_path(tmp_path / "environment.json")).problems) == 2


def test_ops_are_built_once_and_a_killed_build_does_not_hang_the_next(tmp_path: Path):
    """Real compiler; the lock is what torch's builder leaves when it is killed."""
    offloading = job(tmp_path, prebuild_ops=("pin_memory",))
    locked = ops_folder(offloading.scratch) / "pin_memory" / "lock"
    locked.parent.mkdir(parents=True)
    locked.touch()
    for part in (locked.parents[1], locked.parents[2]):
        part.chmod(0o700)
    done = run(offloading, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    node = EnvironmentReport.read(tmp_path / "environment.json").nodes[0]
    assert node["ops"]["cleared"] == ["pin_memory"] and node["ops"]["failed"] == {}
    assert "-g" not in (locked.parent / "build.ninja").read_text().split(), (
        "debug information is a third of the compile"
    )
    started = time.monotonic()
    again = run(offloading, tmp_path)
    first, second = node["ops"]["built"]["pin_memory"], time.monotonic() - started
    assert again.returncode == 0 and not locked.exists()
    assert EnvironmentReport.read(tmp_path / "environment.json").nodes[0]["ops"]["built"]["pin_memory"] < first, second


def test_the_lock_of_a_living_builder_stays(tmp_path: Path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    with lock.open("w"):
        assert clear_stale_locks(tmp_path) == [] and lock.exists()
    assert clear_stale_locks(tmp_path) == ["cpu_adam"] and not lock.parent.exists()


def test_ops_are_not_loaded_from_a_folder_that_others_may_write(tmp_path: Path):
    use_ops_folder(str(tmp_path))
    ops_folder(str(tmp_path)).chmod(0o777)
    with pytest.raises(UserError, match="only this user may write"):
        use_ops_folder(str(tmp_path))
