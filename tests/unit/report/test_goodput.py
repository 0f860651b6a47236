"""Goodput accounting counts each second of a stage once: without faults, and with a crash, a queue and lost work."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.line_record_fields import Event
from longhaul.report.goodput import Goodput, account, read_goodput, start_up_times


def at(time_s: float, event: str, **values: Any) -> Event:
    return {"time_s": time_s, "event": event, **values}


def saved(time_s: float, step: int, training_s: float, saving_s: float = 1.0, validation_s: float = 0.5) -> Event:
    spent = {"training_s": training_s, "saving_s": saving_s, "validation_s": validation_s}
    return at(time_s, "saved", step=step, **spent)


def assert_parts(found: Goodput, total: float, **parts: float) -> None:
    """Compare all parts; those that are not named must be 0."""
    expected = {**dict.fromkeys(asdict(found), 0.0), **parts}
    assert asdict(found) == pytest.approx(expected) and found.total == pytest.approx(total)


def test_stage_without_faults() -> None:
    history = [at(10, "running", queued_since_s=4.0), at(40, "done")]
    found = account(history, [at(15, "training", step=0), saved(28, 10, 11.5), saved(38, 20, 8.5)])
    assert_parts(found, 36, queue=6, start_up=5, training=20, saving=2, validation=1, fault_detection=2)
    assert found.goodput == pytest.approx(20 / 36)
    assert found.shares()["queue"] == pytest.approx(6 / 36) and sum(found.shares().values()) == pytest.approx(1)


def test_crash_and_a_second_allocation() -> None:
    history = [
        at(0, "running"),
        at(20, "restarted"),
        at(50, "waiting"),
        at(80, "running", queued_since_s=50.5),
        at(100, "done"),
    ]
    events = [
        at(5, "training", step=0),
        saved(12, 10, 5.5),
        at(26, "work_lost", to_step=10, steps=4, seconds=3.0),
        at(26, "training", step=10),
        saved(40, 20, 12),
        at(84, "training", step=20),
        saved(98, 30, 12.5),
    ]
    assert_parts(
        account(history, events),
        100,
        queue=30,
        start_up=5,
        restarts=6 + 4,
        training=30,
        lost_work=3,
        saving=3,
        validation=1.5,
        fault_detection=17.5,
    )


def test_damaged_checkpoint_makes_its_steps_lost() -> None:
    history = [at(0, "running"), at(30, "running"), at(60, "done")]
    events = [at(2, "training", step=0), saved(8, 10, 4), saved(15, 20, 5)]
    events += [at(33, "work_lost", to_step=10, steps=10, seconds=5.0), at(33, "training", step=10), saved(50, 20, 5)]
    found = account(history, events)
    assert (found.training, found.lost_work, found.restarts) == (9, 5, 3)
    assert (found.saving, found.validation) == (3, 1.5)


def test_bad_steps_are_lost_work() -> None:
    events = [at(1, "training", step=0), at(3, "bad_step", seconds=1.5), at(4, "bad_step"), saved(9, 10, 4)]
    found = account([at(0, "running"), at(10, "done")], events)
    assert (found.lost_work, found.training) == (1.5, 4)


def test_time_from_a_failure_to_the_next_submission_is_not_queue_time() -> None:
    history = [at(0, "running"), at(20, "failed"), at(1000, "running", queued_since_s=990.0), at(1030, "done")]
    events = [at(5, "training", step=0), at(1004, "training", step=0), saved(1028, 10, 20)]
    found = account(history, events)
    assert (found.stopped, found.queue, found.start_up, found.restarts) == (970, 10, 5, 4)
    assert found.total == pytest.approx(1030)


def test_requeued_job_queues_without_being_stopped() -> None:
    history = [at(0, "running"), at(20, "preempted"), at(50, "running", queued_since_s=15.0), at(60, "done")]
    found = account(history, [])
    assert (found.queue, found.stopped) == (30, 0), "time before the end of the attempt counts as running"


def test_queue_time_is_never_negative() -> None:
    """Clocks of two hosts may differ by seconds."""
    history = [at(10, "running", queued_since_s=12.0), at(20, "done")]
    assert account(history, []).queue == 0


def test_job_that_never_starts_again_has_no_queue_time() -> None:
    """Only the start of an attempt ends queue time."""
    found = account([at(0, "running"), at(20, "waiting"), at(50, "cancelled")], [])
    assert (found.queue, found.stopped, found.total) == (0, 0, 50)


def test_parts_longer_than_the_history_leave_nothing_for_fault_detection() -> None:
    """The clocks of the trainer's and the supervisor's host may differ."""
    found = account([at(0, "running"), at(10, "done")], [at(1, "training", step=0), saved(9, 10, 12)])
    assert found.fault_detection == 0


def test_attempt_without_a_step_is_all_start_up() -> None:
    history = [
        at(0, "running"),
        at(10, "restarted"),
        at(30, "failed"),
        at(70, "running", queued_since_s=60.0),
        at(80, "done"),
    ]
    events = [at(10, "training", step=0), at(72, "training", step=0)]
    assert list(start_up_times(history, events)) == [10, 0, 2], "the step at 10 s is in both attempts that meet there"
    assert list(start_up_times(history, [at(90, "training", step=0)])) == [10, 20, 10]
    assert list(start_up_times([at(5, "running")], [])) == [0]


def test_attempt_ends_when_its_job_is_queued_again() -> None:
    history = [at(0, "running"), at(50, "running", queued_since_s=20.0), at(60, "done")]
    assert list(start_up_times(history, [at(55, "training", step=0)])) == [20, 5]


def test_earlier_complete_run_and_incomplete_line_are_ignored(tmp_path: Path) -> None:
    history = [at(0, "running"), at(9, "done"), at(100, "running", queued_since_s=95.0), at(120, "done")]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    events = [at(1, "training", step=0), saved(8, 10, 6), at(104, "training", step=0), saved(110, 10, 5)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events) + '{"time_s": 11')
    found = read_goodput(tmp_path, tmp_path)
    assert found is not None and (found.total, found.training, found.start_up, found.queue) == (25, 5, 4, 5)
    assert read_goodput(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize("events_after_done", [1, 2])
def test_only_events_after_the_last_done_count(tmp_path: Path, events_after_done: int) -> None:
    history = [at(0, "running"), at(9, "done"), at(100, "running"), at(120, "done")][: 2 + events_after_done]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    found = read_goodput(tmp_path, tmp_path)
    assert found is not None and found.total == (20 if events_after_done == 2 else 0)


def test_events_count_from_the_first_submission(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text(json.dumps(at(100, "running", queued_since_s=95.0)) + "\n")
    rows = [saved(94.9, 10, 1), saved(95, 20, 2), saved(101, 30, 4)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_goodput(tmp_path, tmp_path)
    assert found is not None and found.training == 6


def test_stage_without_duration_has_no_shares() -> None:
    found = account([at(5, "running")], [])
    assert (found.total, found.goodput, found.shares()) == (0, 0, {})
