"""A job of one step, without Slurm, and the failures that it can have."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from longhaul.artifacts.job_state import Failure, launch_key
from longhaul.artifacts.paths import JobFolder
from longhaul.jobs.job_spec import LaunchSpec, LaunchStep
from longhaul.scheduling.supervisor import run


def write_job(folder: Path, code: str, max_restarts: int = 3) -> LaunchSpec:
    """Write launch.json of a training stage below `folder`. Its only step runs Python `code` in the working folder."""
    spec = LaunchSpec(
        run="small",
        name="train-base",
        folder=str(folder / "results/small/stages/base"),
        slurm=False,
        nodes=1,
        requeue=True,
        max_restarts=max_restarts,
        deadline_poll_interval_s=1.0,
        steps=(LaunchStep(title="Training", command=(sys.executable, "-c", code)),),
        inputs=(str(folder / "input"),),
        data=(str(folder / "corpus"),),
        checkpoints=None,
        quarantine="results/quarantine.json",
        attempt_logs=str(folder / "results/small/logs/train/base"),
    )
    spec.write(folder_of(spec).launch_spec)
    return spec


def folder_of(spec: LaunchSpec) -> JobFolder:
    return JobFolder(Path(spec.folder))


def write_failure(spec: LaunchSpec, failure_class: str, invocation: str) -> None:
    """Write failure.json of the job as it is now."""
    key = launch_key(spec.inputs, spec.data)
    failure = Failure(failure_class, "why it failed", "what to do", key=key, invocation=invocation)
    failure.write(folder_of(spec).failure)


def supervise(spec: LaunchSpec) -> int:
    """Run the job's supervisor in this process, in the current folder. Return its exit code."""
    try:
        run(spec)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def fake_program(folder: Path, name: str, script: str) -> str:
    """Write an executable below `folder`. Return a PATH on which it comes first."""
    program = folder / "bin" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(script)
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"
