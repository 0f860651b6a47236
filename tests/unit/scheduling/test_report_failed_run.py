"""The report that a failed run writes: with the state after its main process has ended, and never instead of the first error."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from unittest.mock import Mock

import pytest

from longhaul.artifacts.job_state import CANCELLED, Failure, StateName, current_invocation
from longhaul.artifacts.paths import JobId
from longhaul.cli import main
from longhaul.report import html_page
from longhaul.report.number_format import nats
from longhaul.report.run_status import FAILED, INTERRUPTED, read_status
from longhaul.report.status_text import summary_lines
from longhaul.scheduling.report_failed_run import report_failed_run
from longhaul.scheduling.run_display import RunDisplay
from tests.support.run_folder import TRAIN, RunFolder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A local run whose main process is this one."""
    monkeypatch.setattr(html_page, "get_plotlyjs", lambda: "")
    run = RunFolder(tmp_path, "local")
    run.main_process()
    run.train(40)
    run.state(JobId("environment"), "done", job_id=None)
    return run


def text_of(run: RunFolder) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", run.paths.report.read_text())).split())


@pytest.mark.parametrize(
    ("recorded", "failure_class", "state", "cause"),
    [
        ("failed", "permanent", FAILED, "out of memory"),
        ("failed", CANCELLED, FAILED, "stopped by a user or a signal (SIGTERM)"),
        ("waiting", "", INTERRUPTED, "stopped by a signal; its main process has ended"),
        ("running", "", INTERRUPTED, "its main process has ended"),
    ],
)
def test_report_summary_and_the_status_afterwards_agree(
    run: RunFolder, capsys: pytest.CaptureFixture[str], recorded: StateName, failure_class: str, state: str, cause: str
) -> None:
    run.state(TRAIN, recorded, job_id=None, reason="stopped by a signal" if recorded == "waiting" else "")
    if failure_class:
        invocation = current_invocation(run.paths)
        failure = Failure(failure_class, cause, "what to do", invocation=invocation, time="2026-11-28T10:00:00+00:00")
        failure.write(run.paths.job(TRAIN).failure)
    assert report_failed_run(Mock(), run.paths) == ""
    RunDisplay(run.paths, 2).fail("")
    printed = capsys.readouterr().err
    seen_by_main = read_status(run.paths, main_process_ends=True)
    run.paths.lease.unlink()
    status = read_status(run.paths)
    assert status == replace(seen_by_main, disk_free_bytes=status.disk_free_bytes)
    (stage,) = status.stages
    assert (status.state, stage.job.state, stage.job.detail) == (state, state, cause)
    assert printed.split() == " ".join(summary_lines(status)).split()
    assert f"Report: {run.paths.report}" in printed and f"Run r: {state} (1 of 2 jobs done)" in printed
    progress = stage.progress
    assert progress is not None
    report = text_of(run)
    remedy = ". Remedy: what to do" if failure_class else ""
    assert f"The run is {state} ." in report and f"train-base {state}: {cause}{remedy}" in report
    losses = f"{nats(progress.first_loss)} → {nats(progress.loss)}"
    assert (
        f"base {state} {progress.step}\xa0of\xa0100 {losses}" in report or f"base {state} 40 of 100 {losses}" in report
    )
    assert f"40 of 100 steps, loss {losses}" in printed


@pytest.mark.parametrize("task", [(), ("base", "quiz")], ids=["sources", "task data"])
def test_report_summary_status_and_doctor_name_the_same_failed_fetch(
    run: RunFolder, capsys: pytest.CaptureFixture[str], task: tuple[str, ...]
) -> None:
    run.fail_to_fetch(*task)
    assert report_failed_run(Mock(), run.paths) == ""
    RunDisplay(run.paths, 3).fail("")
    summary = " ".join(capsys.readouterr().err.split())
    run.paths.lease.unlink()
    shown = {}
    for verb in (["status"], ["status", "--json"], ["doctor"]):
        with pytest.raises(SystemExit, match="0"):
            main([*verb, str(run.paths.folder)])
        shown[verb[-1]] = capsys.readouterr().out
    status = json.loads(shown["--json"])
    (fetch,) = status["failed_fetches"]
    assert fetch["name"] == " ".join(("fetch_task_data", *task) if task else ("fetch",))
    assert status["state"] == FAILED
    assert (fetch["cause"], fetch["remedy"]) == (
        "org/x is not on the hub",
        "correct the name; then run the same command again",
    )
    failed = f"{fetch['name']} failed: {fetch['cause']}"
    for text in (summary, " ".join(shown["status"].split())):
        assert f"{failed} remedy: {fetch['remedy']}" in text and "interrupted" not in text
    assert f"Run r: {FAILED} (1 of" in summary and f"Run r on site here: {FAILED} (1 of" in shown["status"]
    assert f"The run is {FAILED} ." in text_of(run) and f"{failed}. Remedy: {fetch['remedy']}" in text_of(run)
    assert f"1. {fetch['name']}: {fetch['cause']}." in shown["doctor"] and "2." not in shown["doctor"]
    assert f"evidence: {fetch['evidence']}" in shown["doctor"] and f"remedy: {fetch['remedy']}" in shown["doctor"]


@pytest.mark.parametrize("damage", ["a folder", "a damaged file"])
def test_report_that_cannot_be_written_hides_nothing(
    run: RunFolder, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run.state(TRAIN, "failed", job_id=None)
    if damage == "a folder":
        run.paths.report.mkdir()
    else:
        run.paths.fabric.write_text("{")
    problem = report_failed_run(Mock(), run.paths)
    RunDisplay(run.paths, 2).fail(problem)
    printed = capsys.readouterr().err
    named = run.paths.report if damage == "a folder" else run.paths.fabric
    assert str(named) in problem and f"warning: report.html is not renewed: {problem}" in printed
    assert "Report:" not in printed and "Run r: " in printed
