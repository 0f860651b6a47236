"""Verbs `longhaul status` and `longhaul doctor`: finds the run that a user names, reads its status, prints text or JSON, repeats
with --watch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from longhaul.artifacts.paths import RESULTS, RunPaths
from longhaul.config.load_config import load_config
from longhaul.errors import UserError, printable
from longhaul.planning.load_plan import config_path
from longhaul.report.diagnose import diagnose, findings_text
from longhaul.report.run_status import RunStatus, read_status, starting_status
from longhaul.report.status_text import status_view
from longhaul.scheduling.job_accounting import ended_jobs
from longhaul.scheduling.read_job_queue import queue_asker

_SLURM_LOGS = Path(".snakemake", "slurm_logs")  # where the Slurm plugin puts the logs of sbatch
_WATCH_EVERY_S = 30.0
_WIDTH_OF_FILES = 160


def run_paths(named: Path | None) -> RunPaths:
    """Return the paths of a run that is named by its folder, its config or `demo`; None: the run that changed last.

    Raises:
        UserError: there is no such run.
    """
    if named is None:
        return _last_run()
    if named.is_dir():
        # Paths are shown as the user gave them, unless they leave out the run's name or the folder that holds results/.
        folder = named if len(named.parts) > 1 and ".." not in named.parts[-2:] else named.resolve()
        return RunPaths(folder.name, folder.parent)
    config = config_path(named)
    if not config.exists():
        raise UserError(f"{config} does not exist", "name the run's YAML file, or its folder results/<run>")
    return RunPaths(load_config(config).config.run)


def _last_run() -> RunPaths:
    runs = {path.parent.name: path for path in RESULTS.glob("*/plan.json")}
    runs |= {paths.run: paths.lease for paths in RunPaths.with_lease() if starting_status(paths)}
    if not runs:
        raise UserError(
            f"{RESULTS.absolute()} holds no run",
            "name the run's config or folder, or work in the folder that holds results/",
        )
    return RunPaths(max(runs, key=lambda name: runs[name].stat().st_mtime))


def print_status(paths: RunPaths, watch: bool) -> None:
    """Print the status once, or again and again until the user stops it."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    view = status_view(_read(paths))
    if not watch or not console.is_terminal:
        console.print(view)
    if not watch:
        return
    with suppress(KeyboardInterrupt):
        if console.is_terminal:
            with Live(view, console=console, auto_refresh=False, screen=False) as live:
                _repeat(paths, lambda view: live.update(view, refresh=True))
        else:
            _repeat(paths, console.print)


def _repeat(paths: RunPaths, show: Callable[[RenderableType], object]) -> NoReturn:
    while True:
        time.sleep(_WATCH_EVERY_S)
        show(_view_or_problem(paths))


def _view_or_problem(paths: RunPaths) -> RenderableType:
    """Return the status, or why it cannot be read now: that may pass, so it does not end --watch."""
    try:
        return status_view(_read(paths))
    except UserError as error:
        return Text(printable(str(error)))


def print_json(paths: RunPaths) -> None:
    """Print the status as one JSON object: the fields of RunStatus, and its `state`. JSON has no NaN: it is null here."""
    status = _read(paths)
    written = json.dumps({"state": status.state, **asdict(status)})
    print(json.dumps(json.loads(written, parse_constant=lambda _: None), indent=2))


def print_diagnosis(paths: RunPaths) -> None:
    """Print why the run fails or waits, with evidence and remedies."""
    status = _read(paths)
    slurm_logs = paths.results.parent / _SLURM_LOGS
    print(findings_text(diagnose(paths, status, slurm_logs, ended_jobs), status))


def _read(paths: RunPaths) -> RunStatus:
    """Read the status.

    Raises:
        UserError: the run has no plan yet, or its folder cannot be read.
    """
    try:
        return starting_status(paths) or read_status(paths, queue_asker(paths))
    except OSError as error:
        raise UserError(
            f"{error.filename or paths.folder} cannot be read: {error.strerror}",
            "ask again; if that does not help, check the file system and the permissions",
        ) from None
