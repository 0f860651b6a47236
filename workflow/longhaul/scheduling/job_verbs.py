"""Registers the hidden verbs `longhaul job supervise`, `render`, `copy-config` and `run`, which launch scripts and rules call;
other modules do the work.

A verb imports what it needs when it runs, so that the start of a job stays fast.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from longhaul.errors import UserError

app = typer.Typer(help="Verbs that launch scripts and rules call.", no_args_is_help=True)


@app.command()
def supervise(spec: Annotated[Path, typer.Argument(help="The rendered launch.json.")]) -> None:
    """Run a job's steps, restart them after a crash, requeue the job."""
    from longhaul.artifacts.paths import JobFolder
    from longhaul.jobs.job_spec import LaunchSpec
    from longhaul.scheduling.supervisor import run as run_supervisor

    _require_no_folder(spec, JobFolder(spec).launch_spec)
    run_supervisor(LaunchSpec.read(spec))


@app.command()
def render(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="The run's YAML file, or `demo` for the demo that longhaul ships.")
    ],
) -> None:
    """Write the launch files of every job of a run."""
    from longhaul.jobs.launch_files import write_launch_files
    from longhaul.planning.load_plan import load_plan

    write_launch_files(load_plan(config), Path.cwd())


@app.command("copy-config")
def copy_run_config(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file, or `demo`.")],
    copy: Annotated[Path, typer.Argument(metavar="COPY", help="Where the copy is written.")],
) -> None:
    """Copy a run's config and site file with full paths, so that the copy works in any folder."""
    from longhaul.config.copy_config import copy_config
    from longhaul.config.load_config import load_config
    from longhaul.planning.load_plan import config_path

    copy_config(load_config(config_path(config)), copy)


@app.command("run")
def run_job(
    kind: Annotated[str, typer.Argument(help="The job's kind: environment, tokenize, train, …")],
    spec: Annotated[Path, typer.Argument(help="The rendered job spec.")],
) -> None:
    """Run one process of a job.

    Records a failure in the job's folder, because the exit code may not reach the supervisor.
    """
    from longhaul.artifacts.paths import JobFolder
    from longhaul.jobs.job_kind import job_kinds
    from longhaul.runtime.lean_imports import lean_imports
    from longhaul.runtime.offline import OFFLINE_ENVIRONMENT

    if kind not in job_kinds():
        raise UserError(f"there is no job kind {kind!r}", f"use one of {', '.join(job_kinds())}")
    _require_no_folder(spec, JobFolder(spec).job_spec)
    os.environ.update(OFFLINE_ENVIRONMENT)
    folder = JobFolder(spec.parent)
    try:
        with lean_imports():
            run_entry_point = job_kinds()[kind].load_entry_point()
        run_entry_point(job_kinds()[kind].spec.read(spec))
    except Exception as error:
        from longhaul.runtime.failure_reports import write_failure_report
        from longhaul.runtime.process_rank import this_rank

        if folder.launch_spec.exists():
            write_failure_report(folder.path, error, this_rank())
        raise


def _require_no_folder(named: Path, expected: Path) -> None:
    """Raise UserError that names the expected file if a user named its folder instead."""
    if named.is_dir():
        raise UserError(f"{named} is a folder; the file {expected.name} of a job is expected", f"name {expected}")
