"""What a run that cannot be finished says, and when: before it submits anything, at an error instead of a retry, and last of all.

Snakemake tries every failed job again as often as the profile says. That is right for a node that died, and wrong where
failure.json says that the job would only fail again, or that a user cancelled it.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longhaul.artifacts.job_state import Failure, invocation, read_failure
from longhaul.errors import UserError
from longhaul.scheduling.resource_requests import final_failure


def end_retries() -> None:
    """Patches Snakemake's job class in the main process, whatever the executor: see `_restart_times`."""
    from snakemake.jobs import Job

    usual: Any = Job.restart_times
    setattr(Job, "restart_times", property(lambda job: _restart_times(job, usual.fget(job))))  # noqa: B010


def _restart_times(job: Any, usual: int) -> int:
    """Snakemake asks when the job's error is known, and tries again while this is not below the attempt's number."""
    folder = folder_of(job)
    return 0 if folder and final_failure(folder) else usual


def refuse_known_failures(jobs: Iterable[Any]) -> None:
    """Raises UserError with the stored reason when a job that is to be run would only fail again.

    jobs: Snakemake's, of this run's rules.
    """
    for folder in filter(None, map(folder_of, jobs)):
        if failure := final_failure(folder):
            raise UserError(
                f"{_name(folder)} failed at {failure.time} and would only fail again: {failure.cause}",
                f"{failure.remedy}; to try all the same: longhaul retry {folder}",
            )


def folder_of(job: Any) -> Path | None:
    """Where a Snakemake job's launch.sh and records lie; None for rules that run on this machine."""
    launch = job.params.get("launch")
    return Path(launch).parent.absolute() if launch else None


def tell_failures_at_exit(run_folder: Path) -> None:
    """Has the terminal told why jobs failed under this main process when it ends; run_folder: results/<run>."""
    atexit.register(_tell, run_folder.absolute())


def call_off() -> None:
    """After a run that succeeded there is nothing to explain."""
    atexit.unregister(_tell)


def _tell(run_folder: Path) -> None:
    for folder, failure in _failures_now(run_folder):
        print(f"\n{_name(folder)} failed ({failure.failure_class}):\n{failure.told()}", file=sys.stderr, flush=True)


def _failures_now(run_folder: Path) -> Iterable[tuple[Path, Failure]]:
    """Those of the main process that holds the run's lease now."""
    this_main = invocation(run_folder.parent, run_folder.name)
    for path in sorted(run_folder.glob("*/*/failure.json")):
        failure = read_failure(path.parent)
        if failure and failure.invocation == this_main:
            yield path.parent, failure


def _name(folder: Path) -> str:
    """train-<stage>, or the job's own."""
    return f"train-{folder.name}" if folder.parent.name == "stages" else folder.name
