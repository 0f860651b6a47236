"""Runs the programs of nccl-tests between all ranks of an allocation, one after the other; fabric.py compares what they measured.

It runs as one process on the first node. Whatever goes wrong with a program becomes a problem in nccl_tests.json, so that the
check's own measurements follow, and the check fails at its end.
"""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from longhaul.artifacts.nccl_tests_report import NcclTestsReport, NcclTestsResult
from longhaul.artifacts.paths import JobFolder
from longhaul.checks.nccl_tests_table import rank_problem, read_table
from longhaul.jobs.kinds.nccl_tests_job import NcclTestsSpec
from longhaul.planning.find_nccl_tests import PROGRAMS, missing_programs, missing_text
from longhaul.runtime.rdma_variables import NCCL_OF_TORCH, set_rdma_variables

LIMIT_S = 90.0
"""Time of one program. Six of them, and the check itself with at most 7 minutes, fit into the default of checks.minutes."""
_STOP_S = 30.0
"""Time that srun gets to end the processes of all nodes."""
_LARGEST_BYTES, _STEP_FACTOR, _ITERATIONS = 2**33, 8, 20
_OPTIONS = ("-b", "8", "-e", str(_LARGEST_BYTES), "-f", str(_STEP_FACTOR), "-n", str(_ITERATIONS), "-w", "0", "-c", "1")
"""8 B to 8 GiB in steps of 8, or as memory allows: the programs reduce the largest size by themselves. Each size begins with a
round that is not timed. No further ones (-w), as they would run at all sizes before the first row."""
_ROUNDS = 1 + _ITERATIONS + 1
_MOST_READ_BYTES = 2**24


@dataclass
class Measured:
    """Result of one program. stops_others: the other programs would fail in the same way, so they are not started."""

    rows: list[NcclTestsResult] = field(default_factory=list)
    problem: str = ""
    warning: str = ""
    stops_others: bool = False


def run(job: NcclTestsSpec) -> None:
    """Run all programs and write nccl_tests.json into the job's folder."""
    folder = JobFolder(Path(job.folder))
    report = NcclTestsReport([])
    programs = Path(job.programs)
    missing = missing_programs(programs)
    if missing:
        report.problems.append(
            f"{missing_text(programs, missing)} on the first node; correct interconnect.nccl_tests in the site file"
        )
    # The adapters of the first node: those of a partition's nodes have the same names.
    for line in set_rdma_variables(NCCL_OF_TORCH):
        print(line, flush=True)
    present = {collective: name for collective, name in PROGRAMS.items() if name not in missing}
    print(f"nccl-tests: {len(present)} programs of {programs}, at most {LIMIT_S:.0f} s each", flush=True)
    for collective, name in present.items():
        found = _measure(job, collective, name)
        report.results.extend(found.rows)
        stopped = "; the programs after it were not started" if found.stops_others else ""
        report.problems.extend([found.problem + stopped] if found.problem else [])
        report.warnings.extend([found.warning] if found.warning else [])
        if stopped:
            break
    report.write(folder.nccl_tests)


def _measure(job: NcclTestsSpec, collective: str, name: str) -> Measured:
    """Run one program and read its table."""
    out = JobFolder(Path(job.folder)).nccl_tests_output(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    gpus = "1" if job.launcher else str(job.ranks)
    try:
        code = _run([*job.launcher, str(Path(job.programs) / name), *_OPTIONS, "-g", gpus], out)
    except OSError as error:
        return Measured(problem=f"{name} cannot be started: {error}", stops_others=bool(job.launcher))
    print(f"{name}: {time.monotonic() - started:.0f} s; what it printed is in {out}", flush=True)
    with out.open("rb") as file:
        text = file.read(_MOST_READ_BYTES).decode(errors="replace")
    if problem := rank_problem(text, job.ranks):
        return Measured(problem=f"{name}: {problem}", stops_others=True)
    try:
        rows = read_table(text, collective, job.ranks)
    except ValueError as error:
        rows, unreadable = [], str(error)
    else:
        unreadable = "" if rows else "it printed no table; use nccl-tests 2.13 or newer"
    return _judged(rows, name, code, unreadable, f"the last line of {out} is: {_last_line(text)}")


def _judged(rows: list[NcclTestsResult], name: str, code: int | None, unreadable: str, printed: str) -> Measured:
    """Return the rows with what went wrong. code: exit code; None: the program did not end in its time."""
    if code is None and rows and _is_slow(rows[-1]):
        return Measured(
            rows, warning=f"{name}: sizes above {rows[-1]['bytes']:,} bytes did not fit into {LIMIT_S:.0f} s"
        )
    if code is None:
        where = f"after the row of {rows[-1]['bytes']:,} bytes" if rows else "before its first row"
        problem = f"{name} did not end within {LIMIT_S:.0f} s, and hung {where}; {printed}"
        return Measured(rows, problem, stops_others=not rows)
    # With wrong values it ends with an error, too: fabric.py reports them.
    if code and not any(has_wrong_values(row) for row in rows):
        remedy = "start it by hand in an allocation, with modules and variables of the site file"
        return Measured(rows, f"{name} ended with code {code}; {printed}; {remedy}", stops_others=not rows)
    return Measured(rows, f"{name}: {unreadable}; {printed}" if unreadable else "")


def has_wrong_values(row: NcclTestsResult) -> bool:
    """Return whether one of the two halves of a row has wrong values."""
    return any(half and half["wrong"] for half in (row["out_of_place"], row["in_place"]))


def _is_slow(row: NcclTestsResult) -> bool:
    """Return whether there is a next size that would have taken a large part of the time. If not, the program hung."""
    if row["bytes"] >= _LARGEST_BYTES:
        return False
    times_us = row["out_of_place"]["time_us"] + (row["in_place"] or row["out_of_place"])["time_us"]
    return times_us / 1e6 * _ROUNDS * _STEP_FACTOR > LIMIT_S / 3


def _run(command: list[str], out: Path) -> int | None:
    """Run a program with its output in a file. Return its exit code; None if it did not end in time and was stopped."""
    # The programs read these: another device, or groups of ranks, or a minimum that changes the exit code.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("NCCL_TESTS_")}
    with out.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=variables
        )
        try:
            return process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            _stop(process)
            return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # Linux keeps it until the GPU answers; the check goes on
            process.wait(_STOP_S)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip("# \t\r")]
    return lines[-1][:300] if lines else "(nothing was printed)"
