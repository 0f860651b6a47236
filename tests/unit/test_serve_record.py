"""The record of `make test-serve` is written when no row is missing, and else not touched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import bench.machine
from longhaul.artifacts.serve_check_result import LoadStep, ServeCheckResult
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


def checked(streams: tuple[int, ...], largest: float | None) -> ServeCheckResult:
    """Return the result of a check. largest: difference of log probabilities; None: of an engine that gives none"""
    step = LoadStep(
        streams=0,
        tokens=32,
        tokens_per_s=1.0,
        first_token_median_s=None,
        first_token_p99_s=None,
        inter_token_median_s=None,
        inter_token_p99_s=None,
        largest_difference=largest,
    )
    return ServeCheckResult(
        stage="chat",
        engine="vllm",
        engine_version="1",
        path="p",
        weights="w",
        tensor=1,
        pipeline=1,
        context_tokens=64,
        answer_tokens=16,
        start_s=1.0,
        refuses_other_keys=True,
        listens_at=[],
        agreement={
            "compared": 62,
            "mean_difference": largest,
            "largest_difference": largest,
            "mean_bound": None,
            "largest_bound": None,
            "same_text": 1.0 if largest is None else None,
            "least_same_text": 0.75 if largest is None else None,
        },
        load=[{**step, "streams": count} for count in streams],
        distinct_answers=1,
        host_memory_bytes=1,
        gpu_memory_bytes=None,
    )


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
    assert (
        "demo vllm, 64 streams 64 answers, 0 lost, 0 mixed, 32 tokens, largest difference 3.0e-06, bound 1e-04" in words
    )
    assert f"demo {TRANSFORMERS_SERVE} 100% of the greedy text, at least 75%" in words
    assert f"demo {TRANSFORMERS_SERVE}, 64 streams 64 answers, 0 lost, 0 mixed, 32 tokens, equal text" in words
    assert len(lines) == 5 + sum(2 + len(rows) for rows in ROWS.values()) - 1
