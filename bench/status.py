"""Measures `longhaul status` and the display of the main process, on a run with 1,000 stages that have trained."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from bench.machine import REPOSITORY, describe_machine, write_result
from longhaul.artifacts.paths import STAGE_KIND, JobId
from longhaul.compat.slurm_plugin import job_name_prefix
from tests.support.run_folder import RunFolder

STAGES, STEPS, ROUNDS, WATCHED_S = 1000, 1000, 5, 240
_SQUEUE = """#!/bin/sh
echo "$@" >> "$0.calls"
for stage in $(seq 1 20); do echo "$stage|PENDING|Priority|N/A|{name}|rule_train_wildcards_r_stage-$stage|{folder}"; done
"""
_HISTORY = (
    '{"time_s": 1.0, "event": "running"}\n{"time_s": 90.0, "event": "waiting"}\n{"time_s": 99.0, "event": "running"}\n'
)
_DISPLAY = """
import os, sys, time
from pathlib import Path
from longhaul.artifacts.paths import RunPaths
from longhaul.scheduling.run_display import RunDisplay
display, before = RunDisplay(RunPaths("r", Path("results")), 0), os.times()
display.start()
time.sleep({seconds})
display.close()
print(sum(os.times()[:4]) - sum(before[:4]))
"""


def main() -> None:
    """Write the runs, and measure each of them."""
    with tempfile.TemporaryDirectory() as name:
        lines = [line for stages in (2, STAGES) for line in _measure(Path(name) / str(stages), stages)]
    write_result(
        "status",
        [
            *describe_machine(("pydantic", "rich")),
            *lines,
            "aim: status within 2 s, one call of squeue, the display below 1 % of a core",
        ],
    )


def _measure(folder: Path, stages: int) -> list[str]:
    size_mb = _write_run(folder, stages) / 1e6
    environment = _environment(folder)
    times_s = [_times_s(folder, environment) for _ in range(ROUNDS)]
    wall_s, cpu_s = (statistics.median(values) for values in zip(*times_s, strict=True))
    calls = len((folder / "bin" / "squeue.calls").read_text().splitlines()) / ROUNDS
    share = _display_cpu_s(folder, environment) / WATCHED_S
    return [
        f"{stages:,} stages of {STEPS:,} steps, {size_mb:,.0f} MB of metrics:",
        f"  longhaul status: {wall_s:.2f} s, of which {cpu_s:.2f} s on a core, medians of {ROUNDS}; calls of squeue: {calls:g}",
        f"  display in a terminal, its calls of squeue included: {share:.2%} of a core over {WATCHED_S} s",
    ]


def _write_run(folder: Path, stages: int) -> int:
    """Write a run whose stages have all trained, and a squeue that knows 20 of its jobs. Return the bytes of the metrics."""
    run = RunFolder(folder, stages=stages)
    sizes = [run.train(STEPS, stage).metrics.stat().st_size for stage in run.names]
    for stage in run.names:
        job = JobId(STAGE_KIND, (stage,))
        run.state(job, "running", job_id=None)
        run.paths.job(job).history.write_text(_HISTORY)
    squeue = folder / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(_SQUEUE.format(folder=folder.resolve(), name=f"{job_name_prefix(run.paths.run)}_{uuid.uuid4()}"))
    squeue.chmod(0o755)
    return sum(sizes)


def _environment(folder: Path) -> dict[str, str]:
    own = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY / "workflow")}
    return {**os.environ, **own, "FORCE_COLOR": "1"}  # FORCE_COLOR: rich takes every stream for a terminal


def _times_s(folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Return the duration of `longhaul status`, and its CPU time, which other processes of the machine do not change."""
    command = [sys.executable, "-m", "longhaul", "status", "results/r"]
    started, before = time.perf_counter(), os.times()
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, cpu_s


def _display_cpu_s(folder: Path, environment: dict[str, str]) -> float:
    """Return the CPU time that the display of a main process takes in WATCHED_S seconds."""
    command = [sys.executable, "-c", _DISPLAY.format(seconds=WATCHED_S)]
    done = subprocess.run(
        command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return float(done.stdout)


if __name__ == "__main__":
    main()
