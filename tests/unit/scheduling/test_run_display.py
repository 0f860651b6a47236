"""Records of Snakemake's log become lines for people."""

from __future__ import annotations

import json
import logging
import os
import pty
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from snakemake.scheduling import job_scheduler
from snakemake_interface_logger_plugins.common import LogEvent

from longhaul.artifacts.job_state import Failure, JobsToRun, State
from longhaul.artifacts.paths import JobId, RunPaths
from longhaul.report.run_status import INTERRUPTED, RUNNING, read_status
from longhaul.report.slurm_queue_types import AskQueue, Queue, QueuedJob
from longhaul.scheduling import run_display, snakefile_functions
from longhaul.scheduling.dry_run_lines import jobs_to_run
from longhaul.scheduling.retry_policy import SnakemakeJob
from longhaul.scheduling.run_display import JobEvents, RunDisplay
from tests.support.run_folder import TRAIN, RunFolder
from tests.support.wait import wait_for


def record(
    event: LogEvent | None = None, level: int = logging.INFO, message: str = "", **fields: Any
) -> logging.LogRecord:
    made = logging.LogRecord("snakemake", level, __file__, 1, message, None, None)
    made.__dict__.update(fields, **({"event": event} if event else {}))
    return made


def started(job: int = 4, rule: str = "train", **fields: Any) -> logging.LogRecord:
    values = {"rule_name": rule, "wildcards": {"run": "r", "stage": "base"}, "log": ["base.log"], "local": False}
    return record(LogEvent.JOB_INFO, jobid=job, **(values | fields))


def failed(job: int = 4, log: str = "base.log") -> logging.LogRecord:
    return record(LogEvent.JOB_ERROR, logging.ERROR, jobid=job, rule_name="train", log=[log])


def test_job_is_named_when_it_starts_and_ends(tmp_path: Path) -> None:
    events = JobEvents(RunPaths("r", tmp_path), 3)
    assert events.line(started()) == "train-base submitted (train one stage), log: base.log"
    report = started(5, "report", wildcards={"run": "r"}, local=True, log=[])
    assert events.line(report) == "report started (write the report)"
    assert events.line(started(6, "count", wildcards={"run": "r"}, log=[])) == "count submitted", "a rule of a user"
    assert events.line(record(LogEvent.JOB_FINISHED, job_id=4)) is None
    line = str(events.line(record(LogEvent.PROGRESS, done=3, total=9)))
    assert line.startswith("train-base done after ") and "jobs" not in line, "there is no plan to count them from"


def test_run_says_at_its_start_what_it_makes_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths are relative, as those of the logs. Slurm is not asked."""
    run = RunFolder(tmp_path)
    monkeypatch.chdir(tmp_path)
    display = RunDisplay(RunPaths("r", Path("results")), 2)
    display.start()
    display.close()
    lines = [line.split("  ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "Run r on site here: trains base (100 steps)",
        "Results, logs and report are written to results/r",
        "Training left in 1 stage: about 56 min 15 s to 1 h 8 min, without queues, validations and saves",
    ]
    run.paths.plan.unlink()
    display = RunDisplay(run.paths, 2)
    display.start()
    display.close()
    assert capsys.readouterr().err == ""


def test_target_rule_is_not_shown(tmp_path: Path) -> None:
    events = JobEvents(RunPaths("r", tmp_path), 3)
    assert events.line(started(0, "all", wildcards={}, log=[])) is None
    assert events.line(record(LogEvent.JOB_FINISHED, job_id=0)) is None
    assert events.line(record(LogEvent.PROGRESS, done=9, total=9)) is None


def test_failure_says_whether_the_job_starts_again_and_so_does_the_status(tmp_path: Path) -> None:
    """Snakemake logs each failed job again before it ends. A cause after which nothing starts again is printed at exit."""
    run = RunFolder(tmp_path, scheduler="local")
    run.main_process()
    invocation = run.paths.lease.read_text()
    job: Any = SimpleNamespace(
        jobid=4, attempt=1, restart_times=1, params={"launch": f"{run.paths.job(TRAIN).path}/launch.sh"}
    )
    events = JobEvents(run.paths, 2)
    events.to_run = {4: job}
    seen: list[tuple[str | None, str, str]] = []
    for attempt in (1, 2):
        job.attempt = attempt
        events.line(started())
        Failure("node", "node n1 is down", "", invocation=invocation).write(run.paths.job(TRAIN).failure)
        line = events.line(failed())
        assert events.line(failed()) is None
        status = read_status(run.paths)
        seen.append((line, status.stages[0].job.state, status.state))
    assert seen == [
        (
            "train-base failed, starts again (attempt 2 of 2); log: base.log\n  cause: node n1 is down",
            "failed, starts again",
            "running",
        ),
        ("train-base failed; log: base.log", "failed", "failed"),
    ]
    assert events.line(record(message="Trying to restart job 4.")) is None, "the line of the failure has said it"


def failing_job(run: RunFolder, events: JobEvents, number: int, stage: str, attempt: int) -> str:
    """Let the job of a stage fail, which Snakemake would start twice. Return the line of the failure."""
    folder = run.paths.job(JobId("train", (stage,)))
    launch = {"launch": f"{folder.path}/launch.sh"}
    events.to_run[number] = cast(
        "SnakemakeJob", SimpleNamespace(jobid=number, attempt=attempt, restart_times=1, params=launch)
    )
    events.line(started(number, wildcards={"run": "r", "stage": stage}))
    Failure("node", "node n1 is down", "", invocation=run.paths.lease.read_text()).write(folder.failure)
    return str(events.line(failed(number)))


@pytest.mark.parametrize("ends_by", ["a final failure", "Ctrl-C", "a final failure with --keep-going"])
def test_no_job_is_said_to_start_again_once_snakemake_starts_none(tmp_path: Path, ends_by: str) -> None:
    """Without --keep-going, Snakemake starts no job after a failure without an attempt left, nor after Ctrl-C."""
    run = RunFolder(tmp_path, scheduler="local", stages=4)
    run.main_process()
    not_yet = JobId("train", ("stage-3",))
    Failure("node", "node n1 is down", "", invocation="an earlier process").write(run.paths.job(not_yet).failure)
    JobsToRun(run.paths.lease.read_text(), {str(not_yet): ""}).write(run.paths.jobs_to_run)
    events = JobEvents(run.paths, 5)
    events.keeps_going = "--keep-going" in ends_by
    assert "starts again (attempt 2 of 2)" in failing_job(run, events, 4, "base", attempt=1)
    assert run.status().stages[0].job.state == "failed, starts again"
    if ends_by == "Ctrl-C":
        events.line(record(message="Terminating processes on user request, this might take some time."))
    else:
        assert "starts again" not in failing_job(run, events, 5, "stage-1", attempt=2)
    goes_on = events.keeps_going
    assert ("starts again (attempt 2 of 2)" in failing_job(run, events, 6, "stage-2", attempt=1)) == goes_on
    expected = "failed, starts again" if goes_on else "failed"
    assert [run.status().stages[number].job.state for number in (0, 2, 3)] == [expected] * 3


def test_cause_of_a_failure_under_an_earlier_main_process_is_shown_at_once(tmp_path: Path) -> None:
    """It is not printed at exit."""
    paths = RunPaths("r", tmp_path)
    failure = Failure("node", "node n1 is down", "", invocation="an earlier process")
    failure.write(paths.job(JobId("train", ("base",))).failure)
    events = JobEvents(paths, 3)
    events.line(started())
    assert events.line(failed()) == "train-base failed; log: base.log\n  cause: node n1 is down"


def test_failure_without_a_record_shows_the_end_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "render.log"
    log.write_text("".join(f"line {k}\n" for k in range(40)))
    events = JobEvents(RunPaths("r", tmp_path), 3)
    events.line(started(log=[str(log)]))
    lines = str(events.line(failed(log=str(log)))).splitlines()
    assert lines[1] == "  line 25" and lines[-1] == "  line 39"


def test_display_and_status_count_the_same_jobs(tmp_path: Path) -> None:
    """Snakemake also counts its target and what the main process does itself."""
    run = RunFolder(tmp_path)
    events = JobEvents(run.paths, 2)
    stats = {"all": 1, "render": 1, "render_result_spec": 2, "train": 1, "report": 1, "total": 6}
    line = events.line(record(LogEvent.RUN_INFO, stats=stats))
    assert line == "1 of 2 jobs to run: train; beside them: render, render_result_spec (2), report"
    assert jobs_to_run({"report": 1, "total": 1}, 2) == "0 of 2 jobs to run; beside them: report"
    assert jobs_to_run({"encode": 3, "train": 1, "total": 4}, 9) == "4 of 9 jobs to run: encode (3), train"
    events.left = {str(TRAIN)}
    events.line(started())
    events.line(record(LogEvent.JOB_FINISHED, job_id=4))
    assert str(events.line(record(LogEvent.PROGRESS, done=5, total=6))).endswith(" (2 of 2 jobs done)")
    events.line(started(5, "report", wildcards={"run": "r"}, local=True, log=[]))
    events.line(record(LogEvent.JOB_FINISHED, job_id=5))
    assert "jobs" not in str(events.line(record(LogEvent.PROGRESS, done=6, total=6))), (
        "the report is no job of the plan"
    )


def test_job_that_runs_again_is_not_done_before_in_display_and_status(tmp_path: Path) -> None:
    """Its state says `done`, from the earlier run. The status sees when the job is done; the display when Snakemake says so."""
    run = RunFolder(tmp_path, scheduler="local", stages=2)
    jobs = [JobId("environment"), TRAIN, JobId("train", ("stage-1",))]
    for job in jobs:
        run.state(job, "done", None)
    assert str(run.status().job_count) == "3 of 3 jobs done"
    run.main_process()
    again: Any = [SimpleNamespace(jobid=0, params={})]
    again += [SimpleNamespace(jobid=k, params={"launch": f"{run.paths.job(jobs[k]).path}/launch.sh"}) for k in (1, 2)]
    snakefile_functions._record_jobs_to_run(run.paths, again)
    display = RunDisplay(run.paths, 3)
    display.start(again)
    display.close()
    counts: list[tuple[str, str]] = []
    for number, stage in ((1, "base"), (2, "stage-1")):
        since = f"2026-11-29T10:00:0{number}+00:00"
        State("done", None, "n1", ["n1"], 1, since).write(run.paths.job(jobs[number]).state)
        display._events.line(started(number, wildcards={"run": "r", "stage": stage}))
        display._events.line(record(LogEvent.JOB_FINISHED, job_id=number))
        line = str(display._events.line(record(LogEvent.PROGRESS, done=number, total=4)))
        counts.append((line.partition(" (")[2], str(run.status().job_count)))
    assert counts == [("2 of 3 jobs done)", "2 of 3 jobs done"), ("3 of 3 jobs done)", "3 of 3 jobs done")]


def test_run_with_nothing_to_do_ends_what_a_stopped_run_had_left(tmp_path: Path) -> None:
    """The user has taken back a change of the config."""
    run = RunFolder(tmp_path, scheduler="local")
    for job in (JobId("environment"), TRAIN):
        run.state(job, "done", None)
    JobsToRun("an earlier process", {str(TRAIN): "2026-11-28T10:00:00+00:00"}).write(run.paths.jobs_to_run)
    status = run.status()
    assert (status.state, status.stages[0].job.state) == ("interrupted", "not started")
    RunDisplay(run.paths, 2).handle(record(message="Nothing to be done (all requested files are present)."))
    assert run.status().state == "done"


@pytest.mark.parametrize(
    "message",
    [
        "Exiting because a job execution failed. Look above for error messages",
        "WorkflowError:\nAt least one job did not complete successfully.",
        "--keep-incomplete mode is set, so incomplete output files and shadow directories of failed jobs are not removed.",
        "RuleException:\nCalledProcessError in file \"train.smk\", line 26:\nCommand 'bash' returned non-zero exit status 1.",
        "Warning: the following output files of rule render were not present when the DAG was created:\n{'results/r/plan.json'}",
    ],
)
def test_warnings_of_snakemake_that_say_nothing_new_are_left_out(tmp_path: Path, message: str) -> None:
    events = JobEvents(RunPaths("r", tmp_path), 3)
    for event, level in ((None, logging.WARNING), (LogEvent.ERROR, logging.ERROR)):
        assert events.line(record(event, level, message)) is None


def test_stop_by_ctrl_c_or_sigterm_is_shown_with_what_follows(tmp_path: Path) -> None:
    """Other messages of Snakemake's own work are not shown once jobs run."""
    events = JobEvents(RunPaths("r", tmp_path), 3)
    events.line(started())
    for message, means in (
        ("Terminating processes on user request, this might take some time.", "the running jobs are being stopped"),
        ("Will exit after finishing currently running jobs (scheduler).", "no other job is started"),
    ):
        line = str(events.line(record(message=message)))
        assert means in line and line.endswith("; the same command continues the run later")
        assert message in Path(job_scheduler.__file__).read_text(), "Snakemake says it in these words"


def test_stop_of_jobs_on_this_machine_says_how_long_they_may_take(tmp_path: Path) -> None:
    events = JobEvents(RunPaths("r", tmp_path), 3)
    events.runs_here = True
    line = str(events.line(record(message="Terminating processes on user request, this might take some time.")))
    assert "trainings save first (5 min at most; another Ctrl-C or signal kills them)" in line


def test_warnings_and_errors_pass_and_snakemakes_own_work_does_not(tmp_path: Path) -> None:
    events = JobEvents(RunPaths("r", tmp_path), 3)
    assert events.line(record(message="Unlocked working directory.")) == "Unlocked working directory."
    assert events.line(record(message="Building DAG of jobs...")) is None
    assert events.line(record(level=logging.WARNING, message="disk is slow")) == "disk is slow"
    assert events.line(record(LogEvent.ERROR, logging.ERROR, "MissingInputException")) == "MissingInputException"
    assert events.line(record(LogEvent.ERROR, logging.ERROR, "RuleException:\nValueError in file x.smk")) is not None
    events.line(started())
    assert events.line(record(message="Trying to restart job 4.")) == "train-base starts again"
    assert events.line(record(message="Execute 2 jobs...")) is None
    assert events.line(record(LogEvent.SHELLCMD, message="bash launch.sh")) is None


def test_stopped_job_is_shown_with_its_recorded_reason_instead_of_the_end_of_its_log(tmp_path: Path) -> None:
    """After Ctrl-C, the log of a training ends with a traceback of torchrun."""
    run = RunFolder(tmp_path)
    log = run.paths.log(TRAIN)
    log.parent.mkdir(parents=True)
    log.write_text("SignalException: Process 7 got signal: 15\n")
    run.state(TRAIN, "waiting", job_id=None, reason="stopped by a signal")
    events = JobEvents(run.paths, 2)
    events.line(started(log=[str(log)]))
    assert events.line(failed()) == (
        f"train-base ended before it was done: stopped by a signal; it continues when it is started again; log: {log}"
    )
    os.utime(run.paths.job(TRAIN).state, (1000, 1000))  # of an earlier attempt: this one recorded nothing
    events.line(started(log=[str(log)]))
    assert "SignalException" in str(events.line(failed()))


def test_job_that_started_after_slurm_was_asked_is_not_shown_as_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = RunFolder(tmp_path), 0

    def ask(paths: RunPaths) -> AskQueue:
        def answer(jobs: list[JobId]) -> Queue:
            nonlocal calls
            calls += 1
            return Queue({} if calls == 1 else {str(TRAIN): QueuedJob("7", "RUNNING", "None", "N/A")})

        return answer

    monkeypatch.setattr(run_display, "queue_asker", ask)
    display = RunDisplay(run.paths, 2)
    for _ in range(3):
        assert display._status() is not None
    assert calls == 1
    run.state(TRAIN, "running")
    for _ in range(3):
        status = display._status()
        assert status is not None and status.stages[0].job.state == RUNNING
    assert calls == 2


def test_slurm_is_asked_once_about_a_job_that_stays_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = RunFolder(tmp_path), 0

    def ask(jobs: list[JobId]) -> Queue:
        nonlocal calls
        calls += 1
        return Queue({})

    monkeypatch.setattr(run_display, "queue_asker", lambda paths: ask)
    run.state(TRAIN, "running")
    display = RunDisplay(run.paths, 2)
    for _ in range(5):
        status = display._status()
        assert status is not None and status.stages[0].job.state == INTERRUPTED
    assert calls == 2


def training_run(tmp_path: Path) -> RunFolder:
    """Return a run without Slurm whose stage trains under this process."""
    run = RunFolder(tmp_path, scheduler="local")
    run.main_process()
    run.state(TRAIN, "running", job_id=None)
    return run


class Screen:
    """Reads all that is written to a terminal or a pipe, so that the writer never waits for a reader."""

    def __init__(self, read_from: int) -> None:
        self.shown = ""
        self._file = read_from
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with suppress(OSError):  # Linux: the other side of a terminal is closed
            while piece := os.read(self._file, 4096):
                self.shown += piece.decode(errors="replace")

    def close(self) -> None:
        """Wait until the writer has closed its side."""
        self._thread.join()
        os.close(self._file)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_shown_again_and_again_while_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    """A log gets a line for each job, a terminal a table with bars, which is drawn again and again."""
    run = training_run(tmp_path)
    weights = run.train(40)
    monkeypatch.setattr(run_display, "_LOG_EVERY_S", 0.01)
    monkeypatch.setattr(run_display, "_TERMINAL_EVERY_S", 0.01)
    monkeypatch.setattr(run_display, "_SHARE_OF_A_CORE", 1.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    ours, theirs = pty.openpty() if is_terminal else os.pipe()
    screen = Screen(ours)
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        display = RunDisplay(run.paths, 2)
        display.start()
        wait_for(lambda: ("40/100" if is_terminal else "step 40 of 100") in screen.shown, 60)
        with weights.metrics.open("a") as metrics:
            metrics.write(json.dumps({"step": 77, "loss": 3.0, "step_time_s": 2.0}) + "\n")
        wait_for(lambda: ("77/100" if is_terminal else "step 77 of 100") in screen.shown, 60)
        display.close()
        display._thread.join()
    screen.close()
    assert ("\u2501" in screen.shown) == is_terminal, "the bar"
    assert ("train-base running, on n1, n2: step 77 of 100, loss " in screen.shown) == (not is_terminal)
    assert display._live is None


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_status_is_shown_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    """The display is closed while another thread reads the status."""
    run = training_run(tmp_path)
    run.train(40)
    display = RunDisplay(run.paths, 2)
    monkeypatch.setattr(display._console, "_force_terminal", is_terminal)
    display.start()
    status = display._status()
    display.close()
    display._thread.join()
    capsys.readouterr()
    assert status is not None
    display._show(status)
    assert capsys.readouterr().err == ""


def test_status_that_takes_long_to_read_is_read_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading takes 1 s of a core, so the next one is 200 s later; after a quick one it is again the usual minute."""
    waits: list[float] = []
    seconds = iter([0.0, 0.1, 5.0, 6.0, 7.0, 7.1])  # before and after each of three readings
    display = RunDisplay(RunPaths("r", tmp_path), 2)

    def wait(wait_s: float) -> None:
        waits.append(wait_s)
        if len(waits) == 4:
            display._stop.set()

    monkeypatch.setattr(display._changed, "wait", wait)
    monkeypatch.setattr(run_display.time, "thread_time", lambda: next(seconds))
    display._refresh()
    assert waits == pytest.approx([60.0, 60.0, 200.0, 60.0])
