"""Benchmarks, packs and attempts of a run are read for the report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longhaul.artifacts.line_record_fields import START_UP_PHASES
from longhaul.artifacts.paths import JobId, RunPaths
from longhaul.report import run_results as module
from longhaul.report.run_results import JobTimespan, StageResults
from tests.support.finished_run_files import write_finished_run

BENCHMARK = "s\th:m:s\n{seconds}\t0:00:01\n"


def test_timespans_end_when_the_benchmark_file_was_written(tmp_path: Path) -> None:
    """Encode jobs, whose names have two parts, are included; jobs without a benchmark file are not."""
    paths = RunPaths("r", tmp_path)
    jobs = [JobId("train", ("base",)), JobId("encode", ("web", "1-of-2")), JobId("environment"), JobId("fabric")]
    for job, seconds, end_s in ((jobs[0], 30, 1030), (jobs[1], 5.5, 900), (jobs[2], 2, 800)):
        path = paths.benchmark(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(BENCHMARK.format(seconds=99) + f"{seconds}\t0:00:01\n")
        os.utime(path, (end_s, end_s))
    plan: Any = {"jobs": [{"kind": job.kind, "names": list(job.names)} for job in jobs]}
    assert module._read_timespans(paths, plan) == [
        JobTimespan("environment", 798, 800),
        JobTimespan("encode-web-1-of-2", 894.5, 900),
        JobTimespan("train-base", 1000, 1030),
    ]


@pytest.mark.parametrize(("done_s", "end_s"), [(1500.0, 1500.0), (1e300, 1400.0), (-5.0, 1400.0)])
def test_timespans_of_a_copied_run_end_when_the_supervisor_recorded_it(
    tmp_path: Path, done_s: float, end_s: float
) -> None:
    """The benchmark file of a copy is as old as the copy. A time that is no date does not count."""
    paths, job = RunPaths("r", tmp_path), JobId("train", ("base",))
    for path in (paths.benchmark(job), paths.job(job).history):
        path.parent.mkdir(parents=True)
    paths.benchmark(job).write_text(BENCHMARK.format(seconds=30))
    os.utime(paths.benchmark(job), (1030, 1030))
    history = [
        {"time_s": 1400.0, "event": "done"},
        {"time_s": done_s, "event": "done"},
        {"time_s": 1e9, "event": "running"},
    ]
    paths.job(job).history.write_text("".join(json.dumps(event) + "\n" for event in history))
    plan: Any = {"jobs": [{"kind": "train", "names": ["base"]}]}
    assert module._read_timespans(paths, plan) == [JobTimespan("train-base", end_s - 30, end_s)]


def test_benchmark_file_without_rows_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "b.tsv").write_text("s\th:m:s\n")
    assert module._benchmark_s(tmp_path / "b.tsv") is None and module._benchmark_s(tmp_path / "none") is None


def test_hosts_of_all_attempts_are_listed_once() -> None:
    attempts = [{"hosts": ["n1", "n2"]}, {"hosts": ["n2", "n3"]}]
    stage: Any = SimpleNamespace(attempts=attempts)
    assert StageResults.hosts.fget(stage) == ["n1", "n2", "n3"]  # type: ignore[misc]


def test_epochs_are_those_of_the_last_attempt() -> None:
    """A stage that was continued with more steps trains more epochs. An older release wrote none."""
    stage: Any = SimpleNamespace(attempts=[{"epochs": {"prose": 1.0}}, {"epochs": {"prose": 2.5}}])
    assert StageResults.epochs.fget(stage) == {"prose": 2.5}  # type: ignore[misc]
    assert StageResults.epochs.fget(SimpleNamespace(attempts=[{}])) == {}  # type: ignore[misc]


def test_duration_of_a_timespan_is_formatted() -> None:
    assert JobTimespan("fabric", 100.0, 352.0).duration == "4 min 12 s"


def test_start_is_that_of_the_last_attempt_with_a_step() -> None:
    def started(seconds: float) -> dict[str, Any]:
        return {"time_s": 1.0, "event": "start_up", **{f"{phase}_s": seconds for phase in START_UP_PHASES}}

    found = module._last_start_up([started(9.0), started(0.5), {"time_s": 2.0, "event": "saved"}])
    assert list(found) == list(START_UP_PHASES) and set(found.values()) == {0.5}
    assert module._last_start_up([{"time_s": 2.0, "event": "training"}]) == {}


def test_run_without_a_copied_config_is_read(tmp_path: Path) -> None:
    """plan.json is written before the first job, the copy of the config by a job."""
    paths = write_finished_run(tmp_path / "results")
    assert module.read_run(paths.folder).config == "run: small\n"
    paths.config.unlink()
    assert module.read_run(paths.folder).config == ""
