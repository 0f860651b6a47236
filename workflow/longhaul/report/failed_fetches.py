"""Finds why a fetch failed, of the hub's sources or of an evaluation task's data: the main process fetches, no job records it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from longhaul.artifacts.paths import RunPaths
from longhaul.report.search_logs import last_error


@dataclass(frozen=True)
class FailedFetch:
    """A fetch that failed.

    name:     `fetch`, or `fetch_task_data <stage> <task>`, as the terminal names it
    evidence: `file:line` of its log
    """

    name: str
    cause: str
    evidence: str
    remedy: str


def failed_fetches(paths: RunPaths, tasks: Iterable[tuple[str, str]]) -> list[FailedFetch]:
    """Return the fetches that have failed and that the run still needs: the sources first, then the data of tasks.

    tasks: (stage, task) of the planned evaluations
    """
    logs = {"fetch": paths.logs / "fetch.log"} if _needs_sources(paths) else {}
    logs |= {
        f"fetch_task_data {stage} {task}": paths.task_data_log(stage, task)
        for stage, task in tasks
        if not paths.task_data(stage, task).exists()
    }
    errors = {name: error for name, log in logs.items() if (error := last_error(log))}
    return [
        FailedFetch(name, cause, evidence, "; then ".join(filter(None, (remedy, "run the same command again"))))
        for name, (cause, evidence, remedy) in errors.items()
    ]


def _needs_sources(paths: RunPaths) -> bool:
    """Return whether the sources are still to be fetched. Rule `render` copies the config after the fetch that it needs; a copy
    that is newer than the log shows that the config names nothing on the hub any more.
    """
    log = paths.logs / "fetch.log"
    if paths.lock.exists() or not log.exists():
        return False
    return not paths.config.exists() or paths.config.stat().st_mtime <= log.stat().st_mtime
