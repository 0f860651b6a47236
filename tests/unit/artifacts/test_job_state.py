"""Failures of jobs: the time for which they apply, and their printed text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longhaul.artifacts.job_state import (
    CANCELLED,
    ENVIRONMENT,
    NODE,
    PERMANENT,
    TRANSIENT,
    Failure,
    Outcome,
    State,
    clear_attempt,
    current_invocation,
    launch_key,
    rank_failures,
    read_outcome,
    utc_now,
)
from longhaul.artifacts.line_record_fields import read_events
from longhaul.artifacts.paths import JobFolder, RunPaths


@pytest.mark.parametrize(
    ("failure_class", "key", "invocation", "applies"),
    [
        (PERMANENT, "k", "another", True),
        (PERMANENT, "other key", "this", False),
        (ENVIRONMENT, "k", "this", True),
        (ENVIRONMENT, "k", "another", False),
        (ENVIRONMENT, "other key", "this", False),
        (CANCELLED, "other key", "this", True),
        (CANCELLED, "k", "another", False),
        (TRANSIENT, "k", "this", False),
        (NODE, "k", "this", False),
    ],
)
def test_failure_applies_to_the_same_inputs_or_invocation(failure_class: str, key: str, invocation: str, applies: bool):
    failure = Failure(failure_class, "cause", "", key=key, invocation=invocation)
    assert failure.still_applies("k", "this") == applies


def test_cancelled_job_without_a_lease_is_retried():
    assert not Failure(CANCELLED, "cause", "", invocation="").still_applies("k", "")


def test_failure_text_has_cause_rank_evidence_and_remedy():
    failure = Failure(PERMANENT, "disk full", "free space", ["line 1"], "n2", 3)
    assert failure.as_text() == "error: disk full (rank 3 on n2)\n  line 1\n  remedy: free space"
    assert Failure(PERMANENT, "disk full", "").as_text() == "error: disk full"


@pytest.mark.parametrize(("value", "may_be_active"), [("running", True), ("waiting", True), ("done", False)])
def test_only_a_running_or_waiting_slurm_job_may_be_active(value: str, may_be_active: bool):
    assert State(value, "7", "n1", ["n1"], 1, utc_now()).may_be_active == may_be_active
    assert not State(value, None, "n1", ["n1"], 1, utc_now()).may_be_active


def test_invocation_is_the_content_of_the_runs_lease(tmp_path: Path):
    paths = RunPaths("small", tmp_path)
    assert current_invocation(paths) == ""
    paths.lease.write_text("owner")
    assert current_invocation(paths) == "owner"


def test_launch_key_changes_with_texts_and_with_size_or_mtime_of_data(tmp_path: Path):
    text, data = tmp_path / "text", tmp_path / "data"
    keys = [launch_key([text], [data])]
    text.write_text("a")
    keys.append(launch_key([text], [data]))
    data.write_text("x")
    keys.append(launch_key([text], [data]))
    os.utime(data, (1, 1))
    keys.append(launch_key([text], [data]))
    assert len(set(keys)) == 4
    os.utime(text, (1, 1))
    assert launch_key([text], [data]) == keys[-1]


def test_failure_reports_are_ordered_by_class_then_rank_and_cleared(tmp_path: Path):
    folder = JobFolder(tmp_path)
    Failure(TRANSIENT, "a", "").write(folder.rank_failure(0))
    Failure(PERMANENT, "b", "").write(folder.rank_failure(3))
    Failure(NODE, "c", "").write(folder.missed_heartbeat(0))
    Outcome("preempted", 4).write(folder.outcome)
    assert [failure.cause for failure in rank_failures(tmp_path)] == ["b", "c", "a"]
    clear_attempt(tmp_path)
    assert rank_failures(tmp_path) == [] and read_outcome(tmp_path) is None


def test_incomplete_line_of_an_event_log_is_skipped(tmp_path: Path):
    log = tmp_path / "history.jsonl"
    assert read_events(log) == []
    log.write_text('{"event": "running", "time_s": 1.5}\n{"event": "do')
    assert read_events(log) == [{"event": "running", "time_s": 1.5}]


def test_reports_of_all_ranks_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A listing for each report would take the time of ranks x ranks."""
    JobFolder(tmp_path).rank_failures.mkdir(parents=True)
    for rank in range(8):
        Failure(TRANSIENT, "connection closed", "", [], "n1", rank).write(JobFolder(tmp_path).rank_failure(rank))
    listed, list_folder = list[Path](), Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: listed.append(folder) or list_folder(folder))
    assert [failure.rank for failure in rank_failures(tmp_path)] == list(range(8))
    assert listed == [JobFolder(tmp_path).rank_failures]
