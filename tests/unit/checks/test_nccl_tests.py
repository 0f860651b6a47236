"""The programs of nccl-tests in the fabric check: tables, whatever can go wrong, and the comparison with limits.

tests/support/fake_nccl_tests.py prints in their format. The real programs need GPUs and MPI.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import failed_path
from longhaul.artifacts.fabric_report import FabricReport
from longhaul.artifacts.nccl_tests_report import NcclTestsReport
from longhaul.artifacts.paths import JobFolder, JobId
from longhaul.checks import nccl_tests
from longhaul.checks.compare_with_published_rates import FabricHardware
from longhaul.checks.judge_nccl_tests import print_nccl_tests, with_nccl_tests
from longhaul.checks.nccl_tests_table import rank_problem, read_table
from longhaul.checks.network_ports_for_nccl import NodeNetwork
from longhaul.errors import UserError
from longhaul.jobs.kinds.nccl_tests_job import NcclTestsSpec
from longhaul.jobs.launch_files import render_job, write_job_files
from longhaul.planning.find_nccl_tests import PROGRAMS
from tests.support.fake_nccl_tests import COLUMNS, NAMES, row, write_programs, write_srun
from tests.support.small_configs import LOCAL, plan_of

FABRIC = JobId("fabric")
RANKS = """\
#  Rank  0 Group  0 Pid 11 on n1 device  0 [0000:0f:00] NVIDIA H100 80GB HBM3
#  Rank  1 Group  0 Pid 12 on n2 device  0 [0000:0f:00] NVIDIA H100 80GB HBM3
"""
# nccl-tests 2.13 (src/common.cu): no groups of ranks, and redop of all_gather may be empty.
OF_2_13 = """\
# nThread 1 nGpus 1 minBytes 8 maxBytes 8 step: 8(factor) warmup iters: 5 iters: 20 agg iters: 1 validation: 1 graph: 0
#
# Using devices
#  Rank  0 Pid   9201 on       n1 device  0 [0x0f] NVIDIA A100-SXM4-80GB
#  Rank  1 Pid   9202 on       n2 device  0 [0x0f] NVIDIA A100-SXM4-80GB
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
NCCL version 2.13.4+cuda11.7
  8589934592     268435456     float              -1   120517   71.28   35.64      0   1.2e+05   71.30   35.65    N/A
# Out of bounds values : 0 OK
"""
# rccl-tests (src/common.cu) without the out-of-place half
OF_RCCL = """\
#   Rank  0 Pid   9201 on       n1 device  0 [0000:c1:00.0] AMD Instinct MI250X
#   Rank  1 Pid   9202 on       n2 device  0 [0000:c1:00.0] AMD Instinct MI250X
#                                                        in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong
           8             2     float     sum      -1    33.10    0.00    0.00      2
"""


def test_a_table_of_the_newest_release_is_read():
    text = f"{RANKS}{COLUMNS}{row(8)}\n{row(1 << 30, 175.0, '0', 'N/A')}\n# Avg bus bandwidth : 90\n"
    small, large = read_table(text, "send_recv", 2)
    assert small["bytes"] == 8 and small["out_of_place"]["time_us"] == 12.0
    assert (large["collective"], large["bytes"], large["world_size"]) == ("send_recv", 1 << 30, 2)
    assert large["out_of_place"] == {
        "time_us": 6135.67,
        "algorithm_bandwidth_gbps": 100.0,
        "bus_bandwidth_gbps": 175.0,
        "wrong": 0.0,
    }
    assert large["in_place"] == {**large["out_of_place"], "wrong": None}


def test_tables_of_old_releases_and_of_rccl_are_read():
    (old,) = read_table(OF_2_13, "all_gather", 2)
    assert old["out_of_place"]["bus_bandwidth_gbps"] == 35.64 and old["in_place"]
    assert old["in_place"]["time_us"] == 120_000 and old["in_place"]["wrong"] is None
    (half,) = read_table(OF_RCCL, "all_reduce", 2)
    assert half["in_place"] is None and half["out_of_place"]["wrong"] == 2
    assert nccl_tests.has_wrong_values(half) and not nccl_tests.has_wrong_values(old)
    assert rank_problem(OF_2_13, 2) == rank_problem(OF_RCCL, 2) == ""


def test_rows_without_an_element_for_each_rank_are_left_out():
    found = read_table(f"{RANKS}{COLUMNS}{row(0)}\n{row(0)}\n{row(512)}\n", "all_gather", 2)
    assert [one["bytes"] for one in found] == [512]


def test_a_row_that_is_cut_off_is_left_out():
    assert [found["bytes"] for found in read_table(f"{RANKS}{COLUMNS}{row(8)}\n{row(64)[:-3]}", "broadcast", 2)] == [8]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{RANKS}{COLUMNS.replace('#wrong', ' error')}{row(8)}\n", "no column #wrong; use nccl-tests 2.13 or newer"),
        (f"{RANKS}{row(8)}\n", "no names of columns before its table"),
        (f"{COLUMNS}{row(8)}\n", "no list of ranks before its table"),
        (f"{RANKS}{COLUMNS}{row(8, wrong='nan')}\n", "no numbers in the row '8 "),
        (f"{RANKS}{COLUMNS}{row(8)[:60]}n1:11 NCCL INFO\n", "remove NCCL_DEBUG"),
        (f"{RANKS}{COLUMNS}{row(8).replace('12.00', '-12.0')}\n", "no numbers in the row"),
    ],
)
def test_a_table_of_another_form_is_refused(text: str, says: str):
    with pytest.raises(ValueError, match=says):
        read_table(text, "all_reduce", 2)


def spec(folder: Path, ranks: int = 2, launcher: tuple[str, ...] = ()) -> NcclTestsSpec:
    return NcclTestsSpec(run="r", programs=str(folder / "build"), launcher=launcher, ranks=ranks, folder=str(folder))


def measured(job: NcclTestsSpec) -> NcclTestsReport:
    nccl_tests.run(job)
    return NcclTestsReport.read(JobFolder(Path(job.folder)).nccl_tests)


@pytest.mark.parametrize("has_srun", [False, True])
def test_all_programs_measure_between_all_ranks(
    tmp_path: Path, has_srun: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Without Slurm one process has all GPUs, and with srun each process has one."""
    monkeypatch.setenv("NCCL_TESTS_SPLIT", "MOD 2")
    write_programs(tmp_path / "build", does="sys.exit(9 if 'NCCL_TESTS_SPLIT' in os.environ else main(sys.argv))")
    report = measured(spec(tmp_path, 2, (str(write_srun(tmp_path, 2)),) if has_srun else ()))
    assert (report.problems, report.warnings) == ([], [])
    assert [one["collective"] for one in report.results] == [name for name in PROGRAMS for _ in range(11)]
    assert list(PROGRAMS.values()) == list(NAMES)
    assert [one["bytes"] for one in report.results[:11]] == [8 << 3 * power for power in range(11)]
    assert {one["world_size"] for one in report.results} == {2}
    assert "all_reduce_perf: " in capsys.readouterr().out


HANG = "main(sys.argv, hangs_after={})"
BAD = {
    "no MPI": ("main(sys.argv)", "2 of 2 processes measured alone, each as rank 0: build nccl-tests with MPI=1", 1),
    "fewer ranks": ("print_start('x', 3); print(row(8))", "between 3 ranks, not 2: check node.gpus", 1),
    "hang at the start": ("time.sleep(1000)", "hung before its first row; the last line of", 1),
    "hang later": (HANG.format(4096), "hung after the row of 4,096 bytes", 2),
    "hang at the end": (
        f"main(sys.argv, rate=0.5, hangs_after={8 << 30})",
        "hung after the row of 8,589,934,592 bytes",
        2,
    ),
    "crash": (
        "print_start('x', 2); print('Test NCCL failure common.cu:1279 \\'unhandled system error\\''); sys.exit(3)",
        "ended with code 3; the last line of",
        1,
    ),
    "killed": ("os.kill(os.getpid(), 9)", "ended with code -9", 1),
    "usage": (
        "print(\"invalid option 'w'\")",
        "it printed no table; use nccl-tests 2.13 or newer; the last line of",
        2,
    ),
    "nothing": ("pass", "(nothing was printed)", 2),
    "another form": ("main(sys.argv, columns='# table\\n')", "no names of columns before its table", 2),
    "binary output": ("sys.stdout.buffer.write(bytes(range(256)) * 100)", "it printed no table", 2),
}


@pytest.mark.parametrize("name", BAD)
def test_whatever_goes_wrong_is_a_problem_with_its_cause(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    does, says, programs = BAD[name]
    monkeypatch.setattr(nccl_tests, "LIMIT_S", 2.0 if "hang" in name else 60.0)
    write_programs(tmp_path / "build", ["all_reduce_perf", "all_gather_perf"], does)
    launcher = (str(write_srun(tmp_path, 2, has_mpi=False)),) if name == "no MPI" else ()
    _, *problems = measured(spec(tmp_path, 2, launcher)).problems  # the first one names the programs that are missing
    assert len(problems) == programs and says in problems[0]
    assert problems[0].startswith("all_reduce_perf")
    assert ("the programs after it were not started" in problems[0]) == (programs == 1)


def test_missing_programs_are_one_problem_and_the_others_run(tmp_path: Path):
    write_programs(tmp_path / "build", ["all_reduce_perf", "broadcast_perf"])
    (tmp_path / "build/broadcast_perf").chmod(0o644)
    report = measured(spec(tmp_path))
    names = "all_gather_perf, reduce_scatter_perf, alltoall_perf, broadcast_perf, sendrecv_perf"
    assert report.problems == [
        f"{tmp_path}/build has no program {names} that this user can start on the first node; correct "
        "interconnect.nccl_tests in the site file"
    ]
    assert {one["collective"] for one in report.results} == {"all_reduce"}
    (tmp_path / "build/all_reduce_perf").write_bytes(b"\x7fELF of another machine")
    assert "all_reduce_perf cannot be started: [Errno 8] Exec format error" in measured(spec(tmp_path)).problems[1]
    without_srun = measured(spec(tmp_path, 2, ("/nowhere/srun",)))
    assert "No such file or directory: '/nowhere/srun'" in without_srun.problems[1]


def test_sizes_that_a_slow_network_has_no_time_for_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nccl_tests, "LIMIT_S", 2.0)
    write_programs(tmp_path / "build", ["all_reduce_perf"], does=f"main(sys.argv, rate=0.5, hangs_after={1 << 24})")
    report = measured(spec(tmp_path))
    assert report.warnings == ["all_reduce_perf: sizes above 16,777,216 bytes did not fit into 2 s"]
    assert [one["bytes"] for one in report.results][-1] == 1 << 24 and len(report.problems) == 1  # missing programs


def rows(folder: Path, **changes: Any) -> NcclTestsReport:
    arguments = ", ".join(f"{name}={value!r}" for name, value in changes.items())
    write_programs(folder / "build", ["all_reduce_perf"], does=f"sys.exit(main(sys.argv, {arguments}))")
    report = measured(spec(folder, 16, (str(write_srun(folder, 16)),)))
    return NcclTestsReport(report.problems[1:], report.results, report.warnings)


def between_16_ranks(**limits: float) -> FabricReport:
    own: Any = {"collective": "all_reduce", "scope": "all", "bytes": 1 << 33, "bus_bandwidth_gbps": 171.5}
    return FabricReport([], "nccl", 16, ["n1", "n2"], [own], limits)


def test_wrong_values_and_low_rates_are_compared_as_the_checks_own(tmp_path: Path):
    """Wrong values end the program with an error, which is no second problem."""
    found = rows(tmp_path, rate=90.0, wrong_at=4096)
    report = with_nccl_tests(
        between_16_ranks(all_reduce_gbps=150.0, all_reduce_latency_us=10.0), found, None, FabricHardware()
    )
    assert report.problems == [
        "nccl-tests: all_reduce of 4,096 bytes gave wrong values",
        "nccl-tests: all_reduce: bus bandwidth 90 GB/s at 8192 MiB over 16 ranks, the site file's minimum is 150 GB/s",
        "nccl-tests: all_reduce: 12 us for the smallest message, the site file's maximum is 10 us",
    ]
    assert report.nccl_tests == found.results and report.warnings == []
    healthy = with_nccl_tests(between_16_ranks(), rows(tmp_path), None, FabricHardware())
    assert (healthy.problems, healthy.warnings) == ([], [])


def test_baseline_and_catalogue_count_for_nccl_tests_too(tmp_path: Path):
    found = rows(tmp_path, rate=90.0)
    hardware = FabricHardware("NVIDIA H100 80GB HBM3", NodeNetwork("InfiniBand", 8, 400.0))
    (line,) = with_nccl_tests(between_16_ranks(), found, None, hardware).warnings
    assert line.startswith("nccl-tests: between all ranks, all_reduce: bus bandwidth 90 GB/s") and "expected" in line
    name = "all_reduce between all ranks, nccl, 16 ranks, 8,589,934,592 bytes"
    usual: Any = type("Baseline", (), {"gpu": hardware.gpu, "network": {name: {"median": 170.0, "lowest": 165.0}}})
    (slow,) = with_nccl_tests(between_16_ranks(), found, usual, hardware).problems
    assert slow == f"nccl-tests: {name}: 90 GB/s, the site's baseline is 170 GB/s"
    accepted = with_nccl_tests(between_16_ranks(), found, usual, hardware, accepts_slow=True)
    assert (accepted.problems, accepted.warnings) == ([], [slow])


def test_problems_of_the_programs_make_the_check_fail(tmp_path: Path):
    found = NcclTestsReport(["all_reduce_perf ended with code 3"], [], ["all_gather_perf: sizes above 8 bytes …"])
    report = with_nccl_tests(between_16_ranks(), found, None, FabricHardware())
    with pytest.raises(UserError, match="nccl-tests: all_reduce_perf ended with code 3"):
        report.write_or_raise(tmp_path / "fabric.json", "the network is not fit", "correct it")
    assert report.warnings == ["nccl-tests: all_gather_perf: sizes above 8 bytes …"]


def test_rates_are_printed_beside_the_checks_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    print_nccl_tests(with_nccl_tests(between_16_ranks(), rows(tmp_path, wrong_at=64), None, FabricHardware()))
    printed = capsys.readouterr().out
    (largest,) = [line for line in printed.splitlines() if "8,589,934,592" in line]
    assert [cell.strip() for cell in largest.strip("│ ").split("│")] == [
        *("all_reduce", "8,589,934,592", "47,721.9", "102.86", "180.00", "180.00", "0", "171.500")
    ]
    assert "nccl-tests between 16 ranks" in printed
    assert [line.split("│")[7].strip() for line in printed.splitlines() if "│ 64 " in line] == ["7"]


def commands(files: dict[str, str]) -> list[list[str]]:
    return [step["command"] for step in json.loads(files["launch.json"])["steps"]]


def test_the_programs_run_by_srun_outside_of_the_container_before_the_check(tmp_path: Path):
    plan = plan_of(
        tmp_path,
        {"checks": {"nodes": 2, "gpus_per_node": 8}},
        {
            "interconnect.nccl_tests": "/opt/nccl-tests/build",
            "software": {"kind": "container", "path": "/images/job.sif"},
            "srun_extra": ["--mpi=pmix"],
            "partitions.0.cpu_bind": "auto",
        },
    )
    files = render_job(plan, FABRIC, tmp_path).files
    first, second = commands(files)
    assert first[1:6] == ["-m", "longhaul", "job", "run", "nccl_tests"] and first[0] == sys.executable
    assert second[0] == "srun" and "apptainer" in second and second[-2] == "fabric"
    found = NcclTestsSpec.model_validate_json(files["nccl_tests_job.json"])
    assert found.launcher == (
        *("srun", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=8", "--gpus-per-node=8"),
        *("--kill-on-bad-exit=1", "--cpu-bind=none", "--mpi=pmix"),
    )
    assert (found.ranks, found.programs) == (16, "/opt/nccl-tests/build")
    assert '"nccl_tests": "/opt/nccl-tests/build"' in files["job.json"]


def test_a_check_of_one_rank_or_without_the_key_has_no_such_step(tmp_path: Path):
    key = {"interconnect.nccl_tests": "/opt/nccl-tests/build"}
    one_rank = plan_of(tmp_path, {"checks": {"nodes": 1, "gpus_per_node": 1}}, key)
    for plan in (one_rank, plan_of(tmp_path)):
        files = render_job(plan, FABRIC, tmp_path).files
        assert len(commands(files)) == 1 and '"nccl_tests": null' in files["job.json"]


def test_missing_programs_are_named_before_anything_is_submitted(tmp_path: Path):
    folder = write_programs(tmp_path / "build", ["all_reduce_perf"])
    key = {"interconnect.nccl_tests": str(folder)}
    with pytest.raises(
        UserError, match=f"interconnect.nccl_tests: {folder} has no program all_gather_perf, "
    ) as refused:
        plan_of(tmp_path / "run", None, key)
    assert "make MPI=1" in refused.value.hint
    write_programs(folder)
    assert plan_of(tmp_path / "run", None, key).warnings == ()
    (warning,) = plan_of(tmp_path / "run", None, {"interconnect.nccl_tests": "/nowhere/build"}).warnings
    assert "/nowhere/build is no folder of this machine" in warning
    with pytest.raises(UserError, match="/nowhere/build has no program all_reduce_perf, "):
        plan_of(tmp_path / "run", None, {**LOCAL, "interconnect.nccl_tests": "/nowhere/build"})


def test_a_job_on_this_machine_runs_the_programs_and_reports_their_rates(tmp_path: Path):
    """launch.sh, as the rule starts it: six programs, then the check of two ranks over gloo, which reads what they measured."""
    write_programs(tmp_path / "build", does="sys.exit(main(sys.argv, rate=70.0))")
    changes = {
        **LOCAL,
        "accelerator": "cpu",
        "partitions.0.node": {"cpus": 2, "memory_mb": 4000},
        "interconnect": {"kind": "none", "nccl_tests": str(tmp_path / "build"), "limits": {"send_recv_gbps": 1e-6}},
        "partitions.0.max_nodes": 1,
    }
    workdir = tmp_path / "run"
    plan = plan_of(workdir, {"checks.gpus_per_node": 2, "stages.0.gpus_per_node": 2}, changes)
    folder = write_job_files(plan, FABRIC, workdir)
    ended = subprocess.run(
        ["bash", folder.launch_script], check=False, cwd=workdir, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = FabricReport.read(workdir / plan.paths.fabric)
    assert len(report.nccl_tests) == 66 and {one["world_size"] for one in report.nccl_tests} == {2}
    assert report.results and not failed_path(workdir / plan.paths.fabric).exists()


def test_program_that_cannot_be_killed_is_left_behind():
    """No test can make a process that SIGKILL does not end, so this one only says how long it is waited for."""
    waits: list[float | None] = []

    class Unkillable:
        def terminate(self) -> None: ...

        kill = terminate

        def wait(self, timeout: float | None = None) -> int:
            waits.append(timeout)
            raise subprocess.TimeoutExpired("all_reduce_perf", timeout or 0.0)

    nccl_tests._stop(Unkillable())  # type: ignore[arg-type]
    assert waits == [30.0, 30.0]
