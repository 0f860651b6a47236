"""The record of `make test-serve` is written when no row is missing, and else not touched."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

import bench.machine
from longhaul.artifacts.serve_check_result import Agreement, LoadStep, ServeCheckResult
from tests.serve.make_exports import CASES
from tests.serve.serve_record import (
    LADDER,
    NOT_EXPORTED,
    ROTARY_KERNEL,
    ROWS,
    STREAMS,
    TRANSFORMERS_SERVE,
    TWO_HOSTS,
    VICTIMS,
    ServeRecord,
)
from tests.support.serve_check_results import SAME_TEXT, SCORES, SERVED, STEP


def checked(streams: tuple[int, ...], largest: float | None) -> ServeCheckResult:
    """Return the result of a check. largest: difference of log probabilities; None: of an engine that gives none"""
    agreement = SAME_TEXT if largest is None else Agreement(**{**SCORES, "largest_difference": largest})
    load = [LoadStep(**{**STEP, "streams": count, "largest_difference": largest}) for count in streams]
    return replace(SERVED, agreement=agreement, load=load)


def filled() -> ServeRecord:
    record = ServeRecord()
    for name in CASES:
        for engine in ("transformers 4", "vllm"):
            record.add_scores(name, engine, 2e-6, 1e-4)
    record.add_scores("demo", "transformers 4", 2e-6, 1e-4)
    record.add_scores("llama", TWO_HOSTS, 2e-6, 1e-4)
    record.add_scores(NOT_EXPORTED, "vllm", 3e-5, 1e-3)
    record.add_scores(NOT_EXPORTED, ROTARY_KERNEL, 6.5, 1e-3)
    record.add_check("llama", TWO_HOSTS, checked((1,), 2e-6), 1e-4)
    for name, streams in {"demo": LADDER, **STREAMS}.items():
        record.add_check(name, "vllm", checked(streams, 3e-6), 1e-4)
        record.add_load(name, "vllm", checked(streams, 3e-6), 1e-4)
    record.add_check("demo", TRANSFORMERS_SERVE, checked(LADDER, None), 0.0)
    record.add_load("demo", TRANSFORMERS_SERVE, checked(LADDER, None), 0.0)
    record.add_end("serve_check ends", "no process left")
    for victim in VICTIMS:
        record.add_end(f"serve_check, kill -9 of the {victim}", "no process left")
    record.add_end("longhaul serve --stop", "no process left")
    record.add_end("longhaul serve, kill -9 of a client", "its request ended")
    return record


def test_it_is_written_when_no_row_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench.machine, "RESULTS", tmp_path)
    record, pythons = filled(), {"vllm": (sys.executable, ("pytest",))}
    assert record.missing() == ["longhaul serve, kill -9 of the supervisor"]
    record.write(pythons)
    assert list(tmp_path.iterdir()) == []
    record.add_end("longhaul serve, kill -9 of the supervisor", "no process left after 0.5 s")
    record.write(pythons)
    lines = (tmp_path / "serve.txt").read_text().splitlines()
    assert lines[0] == "command: make test-serve" and lines[3] == f"versions for vllm: pytest {pytest.__version__}"
    words = [" ".join(line.split()) for line in lines]
    assert "demo vllm 3.0e-06, bound 1e-04" in words
    assert "demo vllm, 64 streams 256 tokens, largest difference 3.0e-06, bound 1e-04" in words
    assert f"demo {TRANSFORMERS_SERVE} 88% of the greedy text, at least 75%" in words
    assert f"demo {TRANSFORMERS_SERVE}, 64 streams 256 tokens, equal text" in words
    assert len(lines) == 5 + sum(2 + len(rows) for rows in ROWS.values()) - 1
