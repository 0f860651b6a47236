"""Measures `longhaul status` and the display on a run with 1,000 stages that have trained, and the load of a main process.

The main process is `snakemake --profile profiles/slurm`, whose jobs wait in the queue of a stand-in for Slurm: the load on the
login node is that of the main process and of the commands that it starts.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil

from bench.machine import REPOSITORY, describe_machine, write_result
from longhaul.artifacts.paths import STAGE_KIND, JobId
from longhaul.compat.slurm_plugin import job_name_prefix
from tests.support.pipeline_run import PipelineRun, tiny_config, write_site
from tests.support.pipeline_run_on_cluster import SITE
from tests.support.run_folder import RunFolder
from tests.support.wait import wait_for

STAGES, STEPS, ROUNDS, WATCHED_S = 1000, 1000, 5, 240
AIM_S, AIM_SHARE = 2.0, 0.01
"""Longest answer of `longhaul status`, and largest share of a core that the display and the main process may take."""
_SETTLED_S = 10.0
"""After the first submission, the main process submits the other jobs that can start."""
_SQUEUE = """#!/bin/sh
echo "$@" >> "$0.calls"
for stage in $(seq 1 20); do echo "$stage|PENDING|Priority|N/A|{name}|rule_train_wildcards_r_stage-$stage|{folder}"; done
"""
_SBATCH = """#!/bin/sh
case "$*" in *--test-only*) exit 0;; esac
echo "$$|$*" >> "{folder}/submitted"
echo $$
"""
_QUEUE_OF_SUBMITTED = """#!/bin/sh
row='s,^([0-9]+)[|].*--job-name[= ](\\S+).*--comment[= ](\\S+).*,\\1|PENDING|Priority|N/A|\\2|\\3|{folder},'
case "$*" in
  *PREEMPTED*) ;;
  *'%i %r'*) sed -E 's,[|].*, Priority,' "{folder}/submitted";;
  *'%k'*) sed -E "$row" "{folder}/submitted";;
  *) sed -E 's,[|].*,|PENDING,' "{folder}/submitted";;
esac
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
        lines += _measure_main_process(Path(name) / "waits")
    write_result(
        "status",
        [
            *describe_machine(("pydantic", "rich", "snakemake")),
            *lines,
            f"aim: status within {AIM_S:g} s, one call of squeue, display and main process below {AIM_SHARE:.0%} of a core",
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
    name = f"{job_name_prefix(run.paths.run)}_{uuid.uuid4()}"
    _write_command(folder, "squeue", _SQUEUE.format(folder=folder.resolve(), name=name))
    return sum(sizes)


def _write_command(folder: Path, name: str, script: str) -> None:
    command = folder / "bin" / name
    command.parent.mkdir(exist_ok=True)
    command.write_text(script)
    command.chmod(0o755)


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


def _measure_main_process(folder: Path) -> list[str]:
    """Start a real main process, and measure it while its jobs wait in the queue."""
    run = PipelineRun(folder, tiny_config(), "slurm")
    write_site(folder, SITE)
    for name, script in (("sbatch", _SBATCH), ("squeue", _QUEUE_OF_SUBMITTED)):
        _write_command(folder, name, script.format(folder=folder.resolve()))
    for name in ("scontrol", "sinfo", "sacct", "sacctmgr", "scancel"):
        _write_command(folder, name, "#!/bin/sh\n")
    environment = {**run.environment(), **_environment(folder)}
    with (folder / "main.log").open("w") as log:
        main = subprocess.Popen(run.command(), cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_for((folder / "submitted").exists, 60)
        time.sleep(_SETTLED_S)
        before_s = _cpu_s(psutil.Process(main.pid))
        time.sleep(WATCHED_S)
        used_s = _cpu_s(psutil.Process(main.pid)) - before_s
        jobs = len((folder / "submitted").read_text().splitlines())
    finally:
        main.kill()  # SIGTERM lets it wait for its jobs, which do not end
        main.wait()
    return [
        f"snakemake --profile profiles/slurm while {jobs} jobs wait, with the display in a terminal:",
        f"  main process, with all commands that it starts: {used_s / WATCHED_S:.2%} of a core over {WATCHED_S} s",
    ]


def _cpu_s(main: psutil.Process) -> float:
    """Return the CPU time of a process and of its children, which its own times include once they have ended."""
    return sum(sum(process.cpu_times()[:4]) for process in (main, *main.children(recursive=True)))


if __name__ == "__main__":
    main()
