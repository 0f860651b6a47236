"""Patches of Snakemake: rerun triggers, order-only inputs, retries, hooks of a module, terminal log. Written for Snakemake
9.27.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from snakemake.cli import args_to_api
from snakemake.dag import DAG
from snakemake.io import IOFile, flag, is_flagged
from snakemake.persistence import PersistenceBase

_ORDER_ONLY = "order_only"


def executor_name() -> str | None:
    """Return the executor that --executor or a profile names; None where the command line did not start Snakemake.

    Snakemake reads the rules before it sets the executor of its workflow; in a dry run it never sets it.
    """
    arguments = _command_line()
    return arguments.executor if arguments else None


def rerun_triggers() -> set[str] | None:
    """Return the changes that run a job again, as --rerun-triggers has them; None where the command line did not start Snakemake.

    Snakemake reads the rules before its workflow has these settings.
    """
    arguments = _command_line()
    return {trigger.item_to_choice() for trigger in arguments.rerun_triggers} if arguments else None


def _command_line() -> Any:
    """Return Snakemake's own arguments, those of the profile included, from its call frame.

    The command line cannot be parsed again: a relative --profile is relative to the folder before --directory.
    """
    frame = inspect.currentframe()
    while frame and frame.f_code is not args_to_api.__code__:
        frame = frame.f_back
    return frame.f_locals["args"] if frame else None


def order_only(paths: list[Path]) -> list[Any]:
    """Return inputs that must exist before a job starts, but whose number and names do not run it again (make's term)."""
    return [flag(str(path), _ORDER_ONLY) for path in paths]


def ignore_order_only_inputs() -> None:
    """Patch the list of inputs that Snakemake compares between runs: it runs a job again when the list differs.

    Snakemake has no order-only inputs; `ancient()` only ignores times of change.
    """
    compared: Any = PersistenceBase._input
    if hasattr(compared, "unpatched"):
        return

    def without_order_only(persistence: Any, job: Any) -> list[str]:
        ignored = {str(path) for path in job.input if is_flagged(path, _ORDER_ONLY)}
        return [path for path in compared(persistence, job) if path not in ignored]

    without_order_only.unpatched = compared  # pyright: ignore[reportFunctionMemberAccess]
    PersistenceBase._input = without_order_only  # pyright: ignore[reportAttributeAccessIssue]


class _WithoutAncient:
    """The edges from a job to the jobs behind it, without those whose files are all `ancient()`."""

    def __init__(self, depending: Any) -> None:
        self._depending = depending

    def __getitem__(self, job: Any) -> dict[Any, Any]:
        behind = self._depending[job].items()
        return {other: files for other, files in behind if not all(file.is_ancient for file in files)}


def examine_jobs_behind_ancient_inputs() -> None:
    """Patch which jobs Snakemake examines for reasons to run: those that are behind another job by `ancient()` inputs, too.

    Snakemake examines no job behind a job that will run, as such jobs will run anyway. With ancient inputs they do not: a job
    whose output is missing, whose other inputs changed or which is forced does not run, and Snakemake exits with 0
    (Snakemake issue 4166).
    """
    usual_update: Any = DAG.update_needrun
    usual_search: Any = DAG.bfs
    if hasattr(usual_update, "unpatched"):
        return
    examined: list[Any] = []

    async def update_needrun(dag: Any, *arguments: Any, **options: Any) -> None:
        examined.append(dag)
        try:
            await usual_update(dag, *arguments, **options)
        finally:
            examined.remove(dag)

    def bfs(dag: Any, direction: Any, *jobs: Any, **options: Any) -> Iterator[Any]:
        is_search_for_examined = dag in examined and direction is dag.depending
        return usual_search(dag, _WithoutAncient(direction) if is_search_for_examined else direction, *jobs, **options)

    update_needrun.unpatched = usual_update  # pyright: ignore[reportFunctionMemberAccess]
    DAG.update_needrun, DAG.bfs = update_needrun, bfs  # pyright: ignore[reportAttributeAccessIssue]


def limit_retries(allowed_restarts: Callable[[Any, int], int]) -> None:
    """Patch how often Snakemake restarts a job: it asks `allowed_restarts(job, number by the profile)` instead.

    Snakemake has no hook that decides on a retry. It compares this property with the number of attempts when a job has
    failed; the property is the same for every executor, and nothing else reads it. Upstream: Snakemake issue 2441 asks for
    such a hook.
    """
    from snakemake.jobs import Job

    usual: Any = Job.restart_times
    setattr(Job, "restart_times", property(lambda job: allowed_restarts(job, usual.fget(job))))  # noqa: B010


def make_again_in_next_run(workflow: Any, output: Path, newer_input: Path) -> None:
    """Let the next run make an output again, although all that it is made from may be as before.

    Snakemake makes an output again if an input is newer, and if its content is not the one in the output's record.
    """
    workflow.persistence.cleanup_metadata(IOFile(str(output)))
    os.utime(newer_input)
    before_s = newer_input.stat().st_mtime - 1
    os.utime(output, (before_s, before_s))


def run_hooks_in_module(
    workflow: Any, on_start: Callable[[], None], on_success: Callable[[], None], on_error: Callable[[], None]
) -> None:
    """Run the hooks of a workflow that another Snakefile uses as a module: Snakemake ignores a module's own hooks.

    Hooks that the using Snakefile declares before its `module` statement run first.

    Upstream: Snakemake issue 3920; since pull request 4050, the using Snakefile may call a module's hooks itself.
    """
    if workflow.modifier.is_main_snakefile():
        return
    workflow._onstart = _chained(workflow._onstart, on_start)
    workflow._onsuccess = _chained(workflow._onsuccess, on_success)
    workflow._onerror = _chained(workflow._onerror, on_error)


def _chained(first: Callable[[Any], None], second: Callable[[], None]) -> Callable[[Any], None]:
    def run(log: Any) -> None:
        first(log)
        second()

    return run


def terminal_log() -> logging.Handler | None:
    """Return the handler that writes Snakemake's log to the terminal; None where the user chose another logger.

    Snakemake has logger plugins, but only a command-line option or a profile can name one, not a Snakefile. Its handler
    is known by its name. Upstream: pull request 3107 brought the plugins.
    """
    from snakemake.logging import logger

    return next((handler for handler in logger.handlers if handler.name == "DefaultStreamHandler"), None)


def is_dry_run(usual: logging.Handler) -> bool:
    """Return whether this is a dry run; the filter of the handler of `terminal_log` knows it."""
    return any(getattr(rule, "dryrun", False) for rule in usual.filters)


def replace_terminal_log(
    usual: logging.Handler, handle: Callable[[logging.LogRecord], None], with_quiet_ones: bool = False
) -> None:
    """Replace the handler of `terminal_log`: `handle` gets the records. The log file stays complete.

    with_quiet_ones: also the records that --quiet leaves out
    """
    from snakemake.logging import logger

    replacement = _CallingHandler(handle)
    for rule in [] if with_quiet_ones else usual.filters:
        replacement.addFilter(rule)
    logger.removeHandler(usual)
    logger.addHandler(replacement)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            # A full disk would print a traceback for every line of the log file. The end of the run names the disk.
            handler.handleError = lambda record: None


class _CallingHandler(logging.Handler):
    """Passes records to a function, and never ends the run because of an error in it."""

    def __init__(self, handle: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._handle = handle

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._handle(record)
        except Exception:  # as logging's own handlers do: what cannot be shown ends nothing
            self.handleError(record)
