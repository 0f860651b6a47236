"""Straggler detection: the ranks that count as slow, and the work that a timing measures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from longhaul.train.monitoring.events import EventWriter
from longhaul.train.monitoring.stragglers import RankTiming, StragglerDetector, matrix_product_s, slow_ranks


def timings(*measured: tuple[float, float]) -> list[RankTiming]:
    return [RankTiming(f"n{rank}", compute_s, wait_s) for rank, (compute_s, wait_s) in enumerate(measured)]


def test_a_rank_that_computes_slowly_is_found_among_two_and_among_many():
    assert slow_ranks(timings((0.010, 0), (0.016, 0)), 0.5, 1.0) == {(1, "compute"): (0.016, 0.010)}
    assert slow_ranks(timings((0.010, 0), (0.014, 0)), 0.5, 1.0) == {}
    assert list(slow_ranks(timings((0.01, 0), (0.05, 0), (0.011, 0), (0.012, 0)), 0.5, 1.0)) == [(1, "compute")]


def test_waiting_for_data_is_compared_with_the_step():
    waiting = timings((0.01, 0.0), (0.01, 0.6), (0.01, 0.1))
    assert list(slow_ranks(waiting, 0.5, 1.0)) == [(1, "reading data")]
    assert slow_ranks(waiting, 0.5, 10.0) == {}


def test_no_rank_is_slow_when_all_are_equal():
    assert slow_ranks(timings((1.0, 5), (1.0, 5), (1.0, 5)), 0.5, 1.0) == {}


def reported_steps(folder: Path, is_slow: list[bool]) -> list[int]:
    """Return the checks, counted from 1, at which rank 1 is reported. is_slow: in which checks it computes slowly."""
    slow, usual = timings((0.01, 0), (0.05, 0)), timings((0.01, 0), (0.01, 0))
    answers = iter([slow if now else usual for now in is_slow])
    context: Any = SimpleNamespace(
        is_main=True,
        device=torch.device("cpu"),
        rank=SimpleNamespace(world_size=2, host="n0"),
        gather=lambda own: next(answers),
    )
    folder.mkdir()
    detector = StragglerDetector(context, 0.5, EventWriter(folder))
    for step in range(1, len(is_slow) + 1):
        detector.check(step, 1.0)
    path = folder / "events.jsonl"
    events = [json.loads(line) for line in path.open()] if path.exists() else []
    return [event["step"] for event in events if (event["event"], event["rank"]) == ("straggler", 1)]


def test_a_rank_is_reported_once_when_it_is_slow_in_three_checks_in_a_row(tmp_path: Path):
    assert reported_steps(tmp_path / "twice", [True, True]) == []
    assert reported_steps(tmp_path / "thrice", [True, True, True, True]) == [3]
    assert reported_steps(tmp_path / "interrupted", [True, True, False, True, False, True]) == []
    assert reported_steps(tmp_path / "again", [True, True, False, True, True, True]) == [6]


def test_the_matrix_product_takes_time():
    assert 0 < matrix_product_s(torch.device("cpu")) < 30
