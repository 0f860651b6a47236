"""The environment check: facts of this machine, problems and warnings of several nodes, locks of killed builds."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from longhaul.artifacts.artifact_schemas import EnvironmentReport, failed_path
from longhaul.artifacts.line_records import read_records
from longhaul.artifacts.node_results import NodeResult
from longhaul.artifacts.paths import JobFolder
from longhaul.checks import environment as check
from longhaul.checks import node_facts as node_module
from longhaul.checks import node_measurements
from longhaul.checks.amd_gpu_facts import AmdGpuFacts, AmdReading
from longhaul.checks.measurement_types import BurnIn, DiskSpeed, NodeMeasurements, SafeWrite
from longhaul.checks.node_facts import compiler, torch_build, write_error
from longhaul.checks.node_problems import node_problems, node_warnings
from longhaul.checks.nvidia_gpu_facts import GpuReading
from longhaul.config.run_config import Checks
from longhaul.config.software_config import Accelerator
from longhaul.errors import BadNodesError, UserError
from longhaul.jobs.kinds.environment_job import EnvironmentSpec
from longhaul.runtime.compiled_ops import ops_folder, remove_stale_builds, use_ops_folder
from longhaul.runtime.failure_reports import classify_error
from longhaul.runtime.process_rank import Rank
from tests.support.healthy_node_facts import environment_job, gpu, hardware, port, two_gpu_nodes
from tests.support.node_facts_of_this_machine import facts_here


def job(folder: Path, **changes: Any) -> EnvironmentSpec:
    """Return the spec of a check of one node, with all paths in a folder."""
    paths = {name: str(folder / value) for name, value in
             {"scratch": "scratch", "folder": "results", "job_folder": ".", "out": "environment.json"}.items()}  # fmt: skip
    settings = {"nodes": 1, "checks": Checks(min_disk_free_gb=0.001), "build": "cpu", **paths}
    return environment_job(**{**settings, **changes})


def test_good_nodes_have_no_problems_and_no_warnings(tmp_path: Path):
    assert node_problems(two_gpu_nodes(), job(tmp_path, build="cuda 13.0")) == []
    assert node_warnings(two_gpu_nodes(), check.tested_versions()) == []


Change = Callable[[dict[str, Any]], object]
BAD: dict[str, tuple[Change, str]] = {
    "another torch": (
        lambda node: node["versions"].update(torch="2.12.0"),
        "torch is not the same on all nodes: 2.13.0+cu130 on n1; 2.12.0 on n2",
    ),
    "another driver": (lambda node: node["versions"].update(driver="570"), "driver is not the same on all nodes"),
    "a build without CUDA": (
        lambda node: node["versions"].update(build="cpu"),
        "n2: torch is built for cpu, the site file says accelerator: cuda 13.0",
    ),
    "no DeepSpeed": (lambda node: node["versions"].update(deepspeed=None), "n2: deepspeed is not installed"),
    "a lost GPU": (
        lambda node: node["gpus"].pop(),
        "n2: torch can use 7 GPUs, 8 are needed (driver: 590.1)",
    ),
    "less memory than in the site file": (
        lambda node: node.update(memory_bytes=99 * 2**20),
        "n2: the node has 99 MiB of memory, the site file says node.memory_mb: 100",
    ),
    "no InfiniBand": (
        lambda node: node.update(hardware=hardware(ports=[port(0, link_layer="Ethernet")])),
        "n2: no active InfiniBand port in /sys/class/infiniband, the site file says interconnect.kind: infiniband",
    ),
    "a port that is down": (
        lambda node: node["hardware"].ports.pop(0),
        "number of active InfiniBand ports is not the same on all nodes: 4 on n1; 3 on n2",
    ),
    "a full disk": (
        lambda node: node.update(disk_free_bytes=10**5),
        "0.0 GB free, checks.min_disk_free_gb is 0.001",
    ),
    "an unwritable folder": (lambda node: node.update(write_error="Read-only file system"), "n2: cannot write to"),
    "a folder that is not shared": (
        lambda node: node.update(run_folder_seen_after_s=None),
        "must be on a shared file system",
    ),
    "a folder that keeps its writes": (
        lambda node: node.update(own_file_seen_after_s=None),
        "are not visible on the first node after 10 s",
    ),
    "a wrong clock": (
        lambda node: node.update(clock_skew_s=-7.25),
        "n2: clock is -7.2 s from that of n1, checks.max_clock_skew_s is 5",
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
        "n2: storage.scratch /local has 1.0 GB free; the ranks of this node offload 2.5 GB",
    ),
    "a scratch folder in memory": (
        lambda node: node["swap"].update(error="Invalid argument"),
        "n2: storage.scratch /local does not support unbuffered writes (Invalid argument), which offloading to nvme needs",
    ),
    "a low limit of locked memory": (
        lambda node: node["swap"].update(lockable_bytes=8 * 2**20),
        "n2: a process may lock 0.008 GB of memory (ulimit -l); offloading to nvme locks 0.100 GB in each process",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_problem_names_its_node_value_and_limit(tmp_path: Path, change: Change, message: str):
    found = two_gpu_nodes()
    change(found[1])
    swapping = {"prebuild_ops": ("cpu_adam",), "swap_bytes": 2_500_000_000, "locked_bytes": 10**8}
    text = "\n".join(node_problems(found, job(tmp_path, build="cuda 13.0", **swapping)))
    assert message in text


def test_warnings_name_untested_versions_small_memory_and_leftovers(tmp_path: Path):
    found = two_gpu_nodes()
    for node in found:
        node["versions"]["deepspeed"] = "0.18.0"
    found[1]["shared_memory_bytes"] = 100 * 2**20
    found[1]["memory_bytes"] = 448 * 2**30
    found[1]["ops"]["removed"] = ["cpu_adam"]
    found[1]["swap"]["removed"] = ["run-base-rank-00003-x"]
    found_warnings = node_warnings(found, check.tested_versions())
    assert found_warnings[0].startswith("deepspeed 0.18.0 is installed; longhaul is tested with ")
    assert found_warnings[1].startswith("n2: /dev/shm has 100 MiB free") and "cpu_adam" in found_warnings[3]
    assert found_warnings[4] == "n2: removed the optimizer states that killed ranks left: run-base-rank-00003-x"
    assert found_warnings[2] == "n2: the node has 448.0 GiB of memory, another node has 512.0 GiB"


def test_small_differences_in_memory_give_no_warning():
    found = two_gpu_nodes()
    found[0]["memory_bytes"], found[1]["memory_bytes"] = 100 * 2**30, 97 * 2**30
    assert node_warnings(found, check.tested_versions()) == []
    found[1]["memory_bytes"] -= 1
    assert len(node_warnings(found, check.tested_versions())) == 1


def test_shared_memory_of_256_mib_gives_no_warning():
    found = two_gpu_nodes()
    for free, warnings in ((256 * 2**20, 0), (256 * 2**20 - 1, 1), (None, 0)):
        found[1]["shared_memory_bytes"] = free
        assert len(node_warnings(found, check.tested_versions())) == warnings


def test_full_shared_memory_is_a_problem_of_the_node(tmp_path: Path):
    found = two_gpu_nodes()
    for free, problems in (
        (16 * 2**20, []),
        (2**20, ["n2: /dev/shm has 1 MiB free, 16 MiB are needed; remove files that killed jobs left there"]),
    ):
        found[1]["shared_memory_bytes"] = free
        assert node_problems(found, job(tmp_path, build="cuda 13.0")) == problems


LIMITS: dict[str, tuple[Callable[[dict[str, Any], int], object], int, int]] = {
    "memory": (lambda node, value: node.update(memory_bytes=value), 100 * 2**20, -1),
    "disk": (lambda node, value: node.update(disk_free_bytes=value), 10**6, -1),
    "clock": (lambda node, value: node.update(clock_skew_s=float(value)), 5, 1),
    "swap space": (lambda node, value: node["swap"].update(free_bytes=value), 2_500_000_000, -1),
    "locked memory": (lambda node, value: node["swap"].update(lockable_bytes=value), 10**8, -1),
}


@pytest.mark.parametrize(("change", "limit", "beyond"), LIMITS.values(), ids=LIMITS)
def test_limits_themselves_are_allowed(
    tmp_path: Path, change: Callable[[dict[str, Any], int], object], limit: int, beyond: int
):
    spec = job(tmp_path, build="cuda 13.0", swap_bytes=2_500_000_000, locked_bytes=10**8)
    for value, count in ((limit, 0), (limit + beyond, 1)):
        found = two_gpu_nodes()
        change(found[1], value)
        assert len(node_problems(found, spec)) == count, value


@pytest.mark.parametrize(("rank", "seen", "own"), [(0, 0.0, 0.0), (1, 0.0, None), (2, 0.0, 0.3)])
def test_files_of_the_first_node_and_own_files_must_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, seen: float, own: float | None
):
    """The first node sees no file of the second one, and that of the third one late."""
    touched: list[Path] = []
    by_first = [0.0, None, 0.3]

    def gather(value: Any, this: Rank) -> list[Any]:
        if isinstance(value, list):
            assert len(value) == (3 if this.is_main else 1)
            touched.extend(tmp_path.iterdir())
            return [by_first]
        (tmp_path / ".shared-test-first-0").touch()
        return ["first"]

    monkeypatch.setattr(check, "_gather", gather)
    monkeypatch.setattr(check, "SHARED_FOLDER_WAIT_S", 0.0)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    found = check._shared_folder_times(Rank(rank, 3, 0, 3, "n1"), tmp_path)
    assert found == {"run_folder_seen_after_s": pytest.approx(seen, abs=0.1), "own_file_seen_after_s": own}
    assert tmp_path / f".shared-test-first-{rank}" in touched
    assert not (tmp_path / f".shared-test-first-{rank}").exists(), "each node removes its own file"


def test_file_that_appears_late_or_never_has_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] > 2.95:
            (tmp_path / "late").touch()

    monkeypatch.setattr(check.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(check.time, "sleep", sleep)
    (tmp_path / "soon").touch()
    files = [tmp_path / name for name in ("soon", "late")]
    assert check._seen_after_s(files) == [0.0, pytest.approx(3.0)] and clock[0] == pytest.approx(3.0)
    clock[0] = 0.0
    assert check._seen_after_s([*files, tmp_path / "never"])[2] is None and clock[0] == pytest.approx(10.0)


def test_unknown_disk_space_is_no_problem(tmp_path: Path):
    found = two_gpu_nodes()
    found[0]["disk_free_bytes"] = found[0]["swap"]["free_bytes"] = found[0]["swap"]["lockable_bytes"] = None
    assert node_problems(found, job(tmp_path, build="cuda 13.0", swap_bytes=10**9, locked_bytes=10**9)) == []


def test_ports_matter_only_between_nodes_and_for_rdma(tmp_path: Path):
    found = two_gpu_nodes()
    found[1]["hardware"] = hardware(ports=[port(0, state="DOWN")])
    for kind in ("roce", "infiniband"):
        assert node_problems(found, job(tmp_path, build="cuda 13.0", interconnect=kind))
        assert node_problems(found[1:], job(tmp_path, build="cuda 13.0", interconnect=kind)) == [], (
            "a single node uses no port"
        )
    assert node_problems(found, job(tmp_path, build="cuda 13.0", interconnect="ethernet")) == []


def test_node_facts_describe_this_machine(tmp_path: Path):
    facts = facts_here("here", job(tmp_path).model_copy(update={"folder": str(tmp_path / "not" / "yet")}))
    assert facts["cpus"] == len(os.sched_getaffinity(0))
    assert facts["memory_bytes"] == psutil.virtual_memory().total
    assert facts["versions"]["torch"].startswith(check.tested_versions()["torch"])
    assert facts["write_error"] is None and (tmp_path / "not" / "yet").is_dir()
    assert list((tmp_path / "not" / "yet").iterdir()) == []
    assert facts["measured"] is None and facts["hardware"].cpu_and_memory.model


def test_processes_on_amd_gpus_are_those_before_the_check_opened_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    readings = iter(
        [AmdReading([AmdGpuFacts("0000:c1:00.0", processes=found)]) for found in ({7: "a"}, {7: "a", 9: "this"})]
    )
    monkeypatch.setattr(node_module, "read_amd_gpus", lambda *addresses: next(readings))
    assert facts_here("here", job(tmp_path))["hardware"].amd_gpus.gpus[0].processes == {7: "a"}


def test_gpus_of_a_killed_attempt_get_time_to_be_released(monkeypatch: pytest.MonkeyPatch):
    """A process that stays is not of this job; those of other jobs' GPUs cost no time."""
    other = gpu(1, processes=["process 9 (python)"])
    busy, free = GpuReading([gpu(0, processes=["process 7 (python)"])]), GpuReading([gpu(0)])
    clock = iter(range(100))
    monkeypatch.setattr(node_module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(node_module.time, "sleep", lambda seconds: None)
    readings = iter([busy, busy, free])
    monkeypatch.setattr(node_module, "read_gpus", lambda uuids: next(readings))
    before = GpuReading([*busy.gpus, other])
    assert node_module._released_gpus(before, ["0"]) == free and next(readings, None) is None
    assert node_module._released_gpus(GpuReading([gpu(0), other]), ["0"]) == free, "it reads nothing"
    assert node_module._released_gpus(before, []) == before, "a job on CPUs waits for no GPU"
    monkeypatch.setattr(node_module, "read_gpus", lambda uuids: busy)
    started = next(clock)
    assert node_module._released_gpus(before, ["0"]) == busy and next(clock) - started < 20


FOUND = [{"uuid": "0", "pci_address": "0000:3b:00.0"}]


def test_a_stage_tests_its_own_gpus_for_a_short_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The CPU stands for a GPU. A node without GPUs measures nothing."""
    sizes = replace(node_measurements._GPU_NODE, matrix=64, copy=4096)
    monkeypatch.setattr(node_measurements, "_GPU_NODE", sizes)
    monkeypatch.setattr(node_measurements, "_gpus", lambda: [torch.device("cpu")])
    monkeypatch.setattr(node_module, "_SHORT_BURN_IN_S", 0.2)
    monkeypatch.setattr(node_module, "gpus", lambda: FOUND)
    measured = facts_here("here", job(tmp_path, build="cuda 13.0"))["measured"]
    assert measured is not None and [device.name for device in measured.devices] == ["GPU 0 (PCI 0000:3b:00.0)"]
    assert measured.devices[0].verified >= 1 and measured.devices[0].wrong_rows == 0
    assert measured.memory_gb_per_s is measured.local_disk is measured.run_folder is None
    monkeypatch.setattr(node_module, "gpus", list)
    assert facts_here("here", job(tmp_path))["measured"] is None


def test_gpu_that_fails_under_load_is_measured_as_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(burn_in_s: float) -> list[BurnIn]:
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    monkeypatch.setattr(node_measurements, "load_devices", fail)
    monkeypatch.setattr(node_module, "gpus", lambda: FOUND)
    measured = facts_here("here", job(tmp_path, build="cuda 13.0"))["measured"]
    assert measured == NodeMeasurements([], error="CUDA error: unspecified launch failure")


def test_write_error_states_why_a_folder_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert write_error(tmp_path / "file") == "File exists"
    assert write_error(tmp_path / "file" / "below") == "Not a directory"


def test_write_probe_needs_a_whole_block(tmp_path: Path):
    """A quota may still allow a file of a few bytes. The file size limit of this process stands for such a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4095, hard))
        too_small = write_error(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        enough = write_error(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (too_small, enough) == ("File too large", None)
    assert list(tmp_path.iterdir()) == []


def test_builds_are_named_as_in_the_site_file():
    assert torch_build("12.8", None) == Accelerator(cuda="12.8").build == "cuda 12.8"
    assert torch_build(None, "6.4.43483-a187df25c") == Accelerator(rocm="6.4").build == "rocm 6.4"
    assert torch_build(None, None) == Accelerator().build == "cpu"


def test_missing_compiler_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler() is None


def run(job: EnvironmentSpec, folder: Path) -> subprocess.CompletedProcess[str]:
    job.write(folder / "job.json")
    command = [sys.executable, "-m", "longhaul", "job", "run", "environment", str(folder / "job.json")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def two_nodes(tmp_path: Path, *bad: bool) -> tuple[list[dict[str, Any]], EnvironmentSpec]:
    """Return the facts of nodes, some of which have a memory error, and the spec of their check."""
    found = [
        {**two_gpu_nodes()[0], "host": f"n{number}", "cpus": 96, "measured": None,
         "hardware": hardware(cpu={"memory_uncorrected": int(is_bad)})}
        for number, is_bad in enumerate(bad, start=1)
    ]  # fmt: skip
    return found, job(tmp_path, nodes=len(bad), build="cuda 13.0")


def test_bad_node_is_excluded_and_the_others_go_on(tmp_path: Path):
    with pytest.raises(BadNodesError, match="n2: uncorrectable memory errors: 1, expected 0") as raised:
        check._judge(*two_nodes(tmp_path, False, True))
    failure = classify_error(raised.value, Rank(0, 2, 0, 2, "n1"))
    assert (failure.failure_class, failure.bad_nodes) == ("node", {"n2": "uncorrectable memory errors: 1"})
    assert EnvironmentReport.read(failed_path(tmp_path / "environment.json")).problems
    check._judge(*two_nodes(tmp_path, False, False))
    results = read_records(JobFolder(tmp_path).node_results, NodeResult)
    assert [(row["node"], row["problem"]) for row in results] == [
        ("n1", ""), ("n2", "uncorrectable memory errors: 1"), ("n1", ""), ("n2", "")]  # fmt: skip
    assert EnvironmentReport.read(tmp_path / "environment.json").problems == []
    assert not failed_path(tmp_path / "environment.json").exists()


def test_no_node_is_excluded_where_all_are_bad_or_another_problem_is_left(tmp_path: Path):
    """Every node has the same fault: the site is to be repaired, not the nodes to be replaced."""
    facts, spec = two_nodes(tmp_path, False, True)
    for node in facts:
        node["versions"]["deepspeed"] = None
    for nodes_and_job in (two_nodes(tmp_path, True, True), two_nodes(tmp_path, True), (facts, spec)):
        with pytest.raises(UserError) as raised:
            check._judge(*nodes_and_job)
        assert not isinstance(raised.value, BadNodesError) and raised.value.failure_class == "environment"


def test_bad_hardware_is_only_reported_where_the_config_says_so(tmp_path: Path):
    facts, spec = two_nodes(tmp_path, False, True)
    check._judge(facts, spec.model_copy(update={"checks": Checks(min_disk_free_gb=0.001, bad_hardware="warn")}))
    report = EnvironmentReport.read(tmp_path / "environment.json")
    assert report.problems == [] and report.warnings[0].startswith("n2: uncorrectable memory errors: 1, expected 0")
    wrong = NodeMeasurements([BurnIn(9, 1, 1.0, 1.0, 1.0, 1.0, "GPU 0")], 1.0, DiskSpeed(1.0, 1.0), SafeWrite(0.1))
    facts[0]["measured"] = wrong
    with pytest.raises(BadNodesError, match="n1: GPU 0: products with a known result: 1 wrong rows") as raised:
        check._judge(facts, spec.model_copy(update={"checks": Checks(min_disk_free_gb=0.001, bad_hardware="warn")}))
    assert list(raised.value.nodes) == ["n1"]


def test_nodes_are_named_as_slurm_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert Rank(0, 1, 0, 1, "n1.cluster.local").node_name == "n1.cluster.local"
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert Rank(0, 1, 0, 1, "n1.cluster.local").node_name == "n1"


def test_problems_stop_the_run_and_are_kept_in_the_failed_report(tmp_path: Path):
    bad = job(tmp_path, checks=Checks(min_disk_free_gb=1e9), swap_bytes=10**18, measures_speed=True)
    done = run(bad, tmp_path)
    assert done.returncode == 2 and "checks.min_disk_free_gb is 1e+09" in done.stderr, done.stderr
    assert "the ranks of this node offload 1000000000.0 GB" in done.stderr
    assert not (tmp_path / "environment.json").exists()
    report = EnvironmentReport.read(failed_path(tmp_path / "environment.json"))
    assert len(report.problems) == 2
    checks = {row["check"]: row["value"] for row in report.checks}
    assert checks["products with a known result"] == "0 wrong rows in 1 products"
    assert checks["memory bandwidth (triad)"].endswith(" GB/s") and checks["file of the first node is visible"]
    assert "hardware checks: " in done.stdout and " 0 fail" in done.stdout


def test_an_op_whose_build_was_killed_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The builder is a stand-in; the next test compiles."""

    class Builder:
        def __init__(self, name: str) -> None:
            self.name = name

        def load(self, verbose: bool) -> None:
            assert os.environ["TORCH_EXTENSIONS_DIR"] == str(ops_folder(str(tmp_path)))
            assert not (ops_folder(str(tmp_path)) / "pin_memory").exists(), (
                "torch would wait for the lock without limit"
            )
            if self.name == "async_io":
                raise RuntimeError("a long command\nlibaio.h: no such file")

    monkeypatch.setattr(node_module, "_builder", Builder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # restored after the test
    locked = use_ops_folder(str(tmp_path)) / "pin_memory" / "lock"
    locked.parent.mkdir()
    locked.touch()
    result = node_module.build_ops(("pin_memory", "async_io"), str(tmp_path))
    assert result["folder"] == str(ops_folder(str(tmp_path))) and result["removed"] == ["pin_memory"]
    assert list(result["built"]) == ["pin_memory"] and result["failed"] == {"async_io": "libaio.h: no such file"}


@pytest.mark.slow
def test_ops_are_built_once_and_locks_of_killed_builds_are_removed(tmp_path: Path):
    """The compiler is real. torch's builder leaves such a lock when it is killed."""
    offloading = job(tmp_path, prebuild_ops=("pin_memory",))
    locked = ops_folder(offloading.scratch) / "pin_memory" / "lock"
    locked.parent.mkdir(parents=True)
    locked.touch()
    for part in (locked.parents[1], locked.parents[2]):
        part.chmod(0o700)
    done = run(offloading, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    node = EnvironmentReport.read(tmp_path / "environment.json").nodes[0]
    assert node["ops"]["removed"] == ["pin_memory"] and node["ops"]["failed"] == {}
    assert "-g" not in (locked.parent / "build.ninja").read_text().split(), (
        "debug information takes a third of the compile time"
    )
    started = time.monotonic()
    again = run(offloading, tmp_path)
    first, second = node["ops"]["built"]["pin_memory"], time.monotonic() - started
    assert again.returncode == 0 and not locked.exists()
    assert EnvironmentReport.read(tmp_path / "environment.json").nodes[0]["ops"]["built"]["pin_memory"] < first, second


def test_lock_of_a_running_build_is_kept(tmp_path: Path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    with lock.open("w"):
        assert remove_stale_builds(tmp_path) == [] and lock.exists()
    assert remove_stale_builds(tmp_path) == ["cpu_adam"] and not lock.parent.exists()


@pytest.mark.parametrize("remedy", ["remove it", "set storage.scratch"])
def test_ops_folder_that_others_may_write_to_is_refused_until_it_is_removed(remedy: str, tmp_path: Path):
    use_ops_folder(str(tmp_path))
    ops_folder(str(tmp_path)).chmod(0o777)
    with pytest.raises(UserError, match="only this user may write") as refused:
        use_ops_folder(str(tmp_path))
    assert remedy in refused.value.hint
    if remedy == "remove it":
        shutil.rmtree(ops_folder(str(tmp_path)))
    use_ops_folder(str(tmp_path / "own" if "scratch" in remedy else tmp_path))


def test_scratch_folder_that_cannot_be_made_is_refused_until_another_is_set(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"cannot be created: .*\s+remedy: set storage.scratch to a folder that you may"
    ):
        use_ops_folder(str(tmp_path / "file/scratch"))
    use_ops_folder(str(tmp_path / "scratch"))
