"""A stage's seconds, each counted once: a calm life, and one with a crash, a queue and lost work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longhaul.report.goodput import account, read_goodput


def at(time_s: float, event: str, **values: object) -> dict[str, object]:
    return {"time_s": time_s, "event": event, **values}


def saved(time_s: float, step: int, training_s: float, saving_s: float = 1.0, validation_s: float = 0.5):
    spent = {"training_s": training_s, "saving_s": saving_s, "validation_s": validation_s}
    return at(time_s, "saved", step=step, **spent)


def test_a_calm_life():
    history = [at(10, "running", queued_since_s=4.0), at(40, "done")]
    found = account(history, [at(15, "training", step=0), saved(28, 10, 11.5), saved(38, 20, 8.5)])
    assert (found.queue, found.start_up, found.restarts, found.training) == (6, 5, 0, 20)
    assert (found.saving, found.validation, found.lost_work) == (2, 1, 0)
    assert found.noticing == pytest.approx(2) and found.total == 36
    assert found.goodput == pytest.approx(20 / 36) and sum(found.shares().values()) == pytest.approx(1)


def test_a_crash_and_another_allocation():
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
    found = account(history, events)
    assert (found.queue, found.start_up, found.restarts) == (30, 5, 6 + 4)
    assert (found.training, found.lost_work) == (30, 3)
    assert found.total == pytest.approx(100)


def test_a_damaged_checkpoint_makes_what_led_to_it_lost():
    history = [at(0, "running"), at(30, "running"), at(60, "done")]
    events = [at(2, "training", step=0), saved(8, 10, 4), saved(15, 20, 5)]
    events += [at(33, "work_lost", to_step=10, steps=10, seconds=5.0), at(33, "training", step=10), saved(50, 20, 5)]
    found = account(history, events)
    assert (found.training, found.lost_work, found.restarts) == (9, 5, 3)


def test_the_time_between_a_failure_and_the_next_submission_is_nobodys_queue():
    history = [at(0, "running"), at(20, "failed"), at(1000, "running", queued_since_s=990.0), at(1030, "done")]
    found = account(history, [at(5, "training", step=0), at(1004, "training", step=0), saved(1028, 10, 20)])
    assert (found.stopped, found.queue, found.start_up, found.restarts) == (970, 10, 5, 4)
    assert found.total == pytest.approx(1030)


def test_an_earlier_life_and_half_a_line_are_left_out(tmp_path: Path):
    history = [at(0, "running"), at(9, "done"), at(100, "running"), at(120, "done")]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    events = [at(1, "training", step=0), saved(8, 10, 6), at(104, "training", step=0), saved(110, 10, 5)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events) + '{"time_s": 1')
    found = read_goodput(tmp_path, tmp_path)
    assert found and (found.total, found.training) == (20, 5)
    assert read_goodput(tmp_path / "none", tmp_path) is None
