"""Prints what `longhaul run` shows in a terminal: a line per event of a job, the end of a failed job's log, progress bars.

Snakemake's log file keeps everything. In a terminal, the stages and jobs stay visible below the lines, with progress bars.
"""

from __future__ import annotations

import atexit
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.live import Live
from snakemake_interface_logger_plugins.common import LogEvent

from longhaul.artifacts.job_state import Failure, read_failure, read_jobs_to_run, read_state
from longhaul.artifacts.paths import JobId, RunPaths
from longhaul.errors import UserError, printable
from longhaul.jobs.job_kind import job_kinds
from longhaul.report import number_format as text
from longhaul.report.run_status import DONE, INTERRUPTED, JobCount, RunStatus, read_status
from longhaul.report.status_text import progress_lines, progress_view, start_lines, summary_lines
from longhaul.scheduling.dry_run_lines import NOTHING_TO_RUN, TARGET_RULE, jobs_to_run
from longhaul.scheduling.read_job_queue import RecentQueue, queue_asker
from longhaul.scheduling.retry_policy import SnakemakeJob, cancel_next_attempt, is_of_this_process, next_attempt
from longhaul.scheduling.run_job_steps import STOP_S

_LOG_EVERY_S, _TERMINAL_EVERY_S, _QUEUE_EVERY_S = 60.0, 5.0, 30.0
_SHARE_OF_A_CORE = 0.005
"""Largest share of a core that reading the status may take on the login node; squeue takes some more."""
_LAST_LOG_LINES = 15
_CLOCKS_DIFFER_S = 10.0
"""Longest difference between the clocks of this host and of the file system."""
_PURPOSES = {
    "fetch": "get the data and models that the config names",
    "fetch_task_data": "get the data of an evaluation task",
    "render": "write plan and launch files",
    "render_result_spec": "write what makes a stage train again",
    "report": "write the report",
}
"""Descriptions of the rules that are no declared job kinds; a kind has its own."""
_RETRY = re.compile(r"Trying to restart job (\d+)\.")
_NO_NEWS = (
    "Assuming unrestricted shared filesystem",
    "Building DAG of jobs",
    "Conda environments: ignored",
    "Group jobs: inactive",
    "Provided ",
    "Rules claiming more threads",
    "Select jobs to execute",
    "Singularity containers: ignored",
    "SLURM run ID",
    "Using shell",
    "host: ",
)
"""Beginnings of messages that Snakemake logs before the first job and that say nothing about this run."""

_TERMINATING = "Terminating processes on user request"
_STOPPED = {
    _TERMINATING: "the running jobs are being stopped",
    "Will exit after finishing currently running jobs": "no other job is started, and this ends with the running jobs",
}
"""Beginning of a message that Snakemake logs after Ctrl-C or SIGTERM -> what it means for the run."""
_STOPPED_HERE = (
    f"the running jobs end, trainings save first ({text.duration(STOP_S)} at most; another Ctrl-C or signal kills them)"
)
"""The same where the jobs run on this machine."""

_SAID_OTHERWISE = (
    "Exiting because a job execution failed",
    "At least one job did not complete successfully",
    "--keep-incomplete mode is set",
    "RuleException:\nCalledProcessError in file",  # the shell command of a job that failed
    "output files of rule render were not present when",  # the start of a run writes the plan, for `longhaul status`
)
"""Texts in warnings and errors that say nothing new: a failed job's own line and the end of the run say why it failed."""


class RunDisplay:
    """The display of one run. All methods can be called from any thread.

    planned: number of jobs in the plan
    """

    def __init__(self, paths: RunPaths, planned: int) -> None:
        # Absolute, because Snakemake leaves --directory before the process ends.
        self._paths, self._paths_at_start = RunPaths(paths.run, paths.results.absolute()), paths
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._events = JobEvents(self._paths, planned)
        self._queue = RecentQueue(queue_asker(self._paths), _QUEUE_EVERY_S)
        self._interrupted: set[str] = set()
        self._begun_s = time.monotonic()
        self._stop, self._changed = threading.Event(), threading.Event()
        self._showing = threading.RLock()
        """Held while the status is shown or the display closes: no status is shown below the summary."""
        self._thread = threading.Thread(target=self._refresh, name="run display", daemon=True)

    def handle(self, record: logging.LogRecord) -> None:
        """Show a record of Snakemake's log, if it is news for the user."""
        if str(record.msg).startswith(NOTHING_TO_RUN):
            self._paths.jobs_to_run.unlink(missing_ok=True)  # of an earlier run; Snakemake calls no hook of this one
            self.finish()
        elif line := self._events.line(record):
            self._queue.forget()
            self._print(line)
            if self._live and record.__dict__.get("event") == LogEvent.JOB_ERROR:
                self._changed.set()  # else the table would still say for a while that the job runs

    def start(self, jobs: Iterable[SnakemakeJob] = (), keeps_going: bool = False, runs_here: bool = False) -> None:
        """Show what the run will make, then the status, until the process ends or `finish` is called.

        jobs:        Snakemake's jobs that are about to run
        keeps_going: Snakemake starts other jobs when one has failed and does not start again (--keep-going)
        runs_here:   the jobs run on this machine
        """
        self._events.to_run = {job.jobid: job for job in jobs}
        self._events.runs_here = runs_here
        self._events.keeps_going = keeps_going
        atexit.register(self.close)
        with suppress(UserError, OSError):
            status = read_status(self._paths_at_start)
            self._events.left = {job.name for job in status.jobs if job.state != DONE}
            for line in start_lines(status):
                self._print(line)
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._thread.start()

    def close(self) -> None:
        """Stop showing the status."""
        with self._showing:
            self._stop.set()
            self._changed.set()
            if self._live:
                self._live.stop()
                self._live = None

    def finish(self) -> None:
        """Show the summary of a run that succeeded."""
        self.close()
        self._queue.forget()
        if status := self._status():
            summary = "\n".join(summary_lines(status, time.monotonic() - self._begun_s))
            self._console.print(printable(summary), markup=False)

    def fail(self, report_problem: str) -> None:
        """Show the summary of a run that failed or was stopped; the causes follow at exit.

        report_problem: why the report could not be written; "" if it is written
        """
        self.close()
        self._queue.forget()
        with suppress(UserError, OSError):
            status = read_status(self._paths, self._queue, main_process_ends=True)
            if report_problem:
                status = replace(status, report=None)
            self._console.print(printable("\n".join(summary_lines(status))), markup=False)
        if report_problem:
            self._print(f"warning: report.html is not renewed: {report_problem}")

    def _print(self, line: str) -> None:
        self._console.print(f"{time.strftime('%H:%M:%S')}  {printable(line)}", markup=False)

    def _refresh(self) -> None:
        wait_s = usual_s = _TERMINAL_EVERY_S if self._live else _LOG_EVERY_S
        while True:
            self._changed.wait(wait_s)
            self._changed.clear()
            if self._stop.is_set():
                return
            begun_s = time.thread_time()
            if status := self._status():
                self._show(status)
            wait_s = max(usual_s, (time.thread_time() - begun_s) / _SHARE_OF_A_CORE)

    def _status(self) -> RunStatus | None:
        try:
            status = read_status(self._paths, self._queue)
            interrupted = {job.name for job in status.jobs if job.state == INTERRUPTED}
            is_news, self._interrupted = not interrupted <= self._interrupted, interrupted
            if is_news:
                self._queue.forget()  # the job may have been submitted after Slurm was asked
                status = read_status(self._paths, self._queue)
            return status
        except (UserError, OSError):
            return None  # plan.json is not written yet, or the file system does not answer: the next call may succeed

    def _show(self, status: RunStatus) -> None:
        with self._showing:
            if self._stop.is_set():
                return  # the display was closed while the status was read
            if self._live:
                self._live.update(progress_view(status), refresh=True)
                return
            for line in progress_lines(status):
                self._print(line)


class JobEvents:
    """Turns records of Snakemake's log into lines for people."""

    def __init__(self, paths: RunPaths, planned: int) -> None:
        self._paths, self._planned = paths, planned
        self.to_run: dict[int, SnakemakeJob] = {}
        """Snakemake's jobs by their number: they know whether Snakemake starts them again."""
        self.left: set[str] | None = None
        """Jobs of the plan that are not done; None if the status could not be read at the start of the run."""
        self.keeps_going = False
        self.runs_here = False
        self._starts_no_job = False
        self._jobs: dict[int, _Job] = {}
        self._failed: set[int] = set()
        """Jobs that have failed and have not started again."""
        self._last_done: _Job | None = None

    def line(self, record: logging.LogRecord) -> str | None:
        """Return a line for a record, or None where it is no news.

        The fields of a record are documented in snakemake_interface_logger_plugins.
        """
        fields: dict[str, Any] = record.__dict__
        handlers: dict[Any, Callable[[dict[str, Any]], str | None]] = {
            LogEvent.RUN_INFO: lambda fields: jobs_to_run(fields["stats"], self._planned),
            LogEvent.JOB_INFO: self._started,
            LogEvent.JOB_FINISHED: self._finished,
            LogEvent.PROGRESS: self._progress,
            LogEvent.JOB_ERROR: self._error,
        }
        event = fields.get("event")
        if handler := handlers.get(event):
            return handler(fields)
        if retried := _RETRY.match(str(record.msg)):
            return self._starts_again(int(retried[1]))
        if stopped := next((what for begin, what in _STOPPED.items() if str(record.msg).startswith(begin)), None):
            self._start_no_job()
            if self.runs_here and str(record.msg).startswith(_TERMINATING):
                stopped = _STOPPED_HERE
            return f"stopped by a user or a signal: {stopped}; the same command continues the run later"
        return record.getMessage() if event in (None, LogEvent.ERROR) and self._is_news(record) else None

    def _is_news(self, record: logging.LogRecord) -> bool:
        message = str(record.msg)
        if record.levelno >= logging.WARNING:
            return not any(said in message for said in _SAID_OTHERWISE)
        # Once jobs run, other messages only describe Snakemake's own work.
        return not self._jobs and not message.startswith(_NO_NEWS)

    def _started(self, fields: dict[str, Any]) -> str | None:
        job = _Job.of(fields)
        self._jobs[fields["jobid"]] = job
        self._failed.discard(fields["jobid"])
        if job.rule == TARGET_RULE:
            return None
        log = f", log: {job.log}" if job.log else ""
        purpose = f" ({job.purpose})" if job.purpose else ""
        return f"{job.name} {'started' if fields['local'] else 'submitted'}{purpose}{log}"

    def _finished(self, fields: dict[str, Any]) -> None:
        self._last_done = self._jobs.get(fields["job_id"])
        if self._last_done and self.left:
            self.left.discard(str(self._last_done.job_id))

    def _progress(self, fields: dict[str, Any]) -> str | None:
        job = self._last_done
        if job is None or job.rule == TARGET_RULE:
            return None
        # Counted in memory, as Snakemake starts no job while its log is written. `longhaul status` counts the same jobs.
        is_counted = job.job_id and self.left is not None
        count = f" ({JobCount(self._planned - len(self.left or ()), self._planned)})" if is_counted else ""
        return f"{job.name} done after {text.duration(time.monotonic() - job.begun_s)}{count}"

    def _error(self, fields: dict[str, Any]) -> str | None:
        if fields["jobid"] in self._failed:
            return None
        self._failed.add(fields["jobid"])
        job = self._jobs.get(fields["jobid"]) or _Job.of(fields)
        attempt = self._next_attempt(fields["jobid"])
        if stopped := self._why_stopped(job):
            continues = f"it starts again ({attempt})" if attempt else "it continues when it is started again"
            return f"{job.name} ended before it was done: {stopped}; {continues}; log: {job.log}"
        again = f", starts again ({attempt})" if attempt else ""
        return f"{job.name} failed{again}; log: {job.log}\n{self._reason(job, bool(attempt))}".rstrip()

    def _next_attempt(self, number: int) -> str:
        to_run = self.to_run.get(number)
        if to_run is None or self._starts_no_job:
            return ""
        attempt = next_attempt(to_run)
        if not attempt and not self.keeps_going:
            self._start_no_job()
        return attempt

    def _start_no_job(self) -> None:
        """Note that Snakemake starts no job any more, also none that has failed and has attempts left."""
        self._starts_no_job = True
        for job in filter(None, map(self.to_run.get, self._failed)):
            cancel_next_attempt(job)
        if (to_run := read_jobs_to_run(self._paths)).left:
            # A full disk must not hide why the job failed. The record only gives the status its words.
            with suppress(OSError):
                replace(to_run, invocation="").write(self._paths.jobs_to_run)

    def _starts_again(self, number: int) -> str | None:
        """Return a line for a restart that no line of a failure has announced: the job ended well, but without its output."""
        return None if number in self._failed else f"{self._jobs[number].name} starts again"

    def _recorded_failure(self, job: _Job) -> Failure | None:
        return read_failure(self._paths.job(job.job_id).path) if job.job_id else None

    def _why_stopped(self, job: _Job) -> str:
        """Return the recorded reason of a job that ended before it was done and can continue; "" for any other."""
        folder = self._paths.job(job.job_id) if job.job_id else None
        state = read_state(folder.path) if folder and not read_failure(folder.path) else None
        if folder is None or state is None or state.state != "waiting":
            return ""
        # An attempt that ended before its supervisor began leaves the record of an earlier one.
        age_s = time.time() - folder.state.stat().st_mtime
        return state.reason if age_s <= time.monotonic() - job.begun_s + _CLOCKS_DIFFER_S else ""

    def _reason(self, job: _Job, starts_again: bool) -> str:
        """Return the cause that the job recorded, else the last lines of its log; nothing if the cause is printed at the end."""
        failure = self._recorded_failure(job)
        if failure:
            is_printed_later = not starts_again and is_of_this_process(failure, self._paths)
            return "" if is_printed_later else f"  cause: {failure.cause}"
        of_attempts = self._paths.attempt_logs(job.job_id).logs() if job.job_id else []
        log = of_attempts[-1] if of_attempts else job.log
        if log is None or not log.exists():
            return ""
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-_LAST_LOG_LINES:])


@dataclass(frozen=True)
class _Job:
    """A job of Snakemake. job_id: None for rules without a declared job kind, such as render and report."""

    rule: str
    wildcards: dict[str, str]
    log: Path | None
    begun_s: float

    @classmethod
    def of(cls, fields: dict[str, Any]) -> _Job:
        log = Path(fields["log"][0]) if fields["log"] else None
        return cls(fields["rule_name"], dict(fields.get("wildcards") or {}), log, time.monotonic())

    @property
    def job_id(self) -> JobId | None:
        kind = job_kinds().get(self.rule)
        return kind.job_id(SimpleNamespace(**self.wildcards)) if kind else None

    @property
    def purpose(self) -> str:
        """Return what the job does, for people who do not know the workflow; "" if nothing says it."""
        kind = job_kinds().get(self.rule)
        return kind.help if kind else _PURPOSES.get(self.rule, "")

    @property
    def name(self) -> str:
        """Return the name that users see."""
        others = (value for key, value in self.wildcards.items() if key != "run")
        return str(self.job_id) if self.job_id else " ".join((self.rule, *others))
