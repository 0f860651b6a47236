"""Order of the faults that a job has survived."""

from __future__ import annotations

import json
from pathlib import Path

from longhaul.artifacts.line_record_fields import read_events
from longhaul.report.past_attempts import past_faults
from longhaul.report.search_logs import search_log


def test_the_end_of_an_allocation_is_named_before_its_effect_on_a_step(tmp_path: Path):
    """At a preemption with grace time, Slurm cancels the step, and nothing says why."""
    log, history = tmp_path / "attempt-0001.log", tmp_path / "history.jsonl"
    log.write_text("0: slurmstepd-n1: error: *** STEP 51.1 ON n1 CANCELLED AT 2026-11-29T06:37:23 ***\n")
    events = [
        {"time_s": 10.0, "event": "running", "allocation": 1, "job_id": "51", "reason": ""},
        {
            "time_s": 20.0,
            "event": "waiting",
            "allocation": 1,
            "job_id": "51",
            "reason": "Slurm ended the allocation (RUNNING)",
        },
        {"time_s": 30.0, "event": "running", "allocation": 2, "job_id": "51", "reason": ""},
    ]
    history.write_text("".join(f"{json.dumps(event)}\n" for event in events))
    found = past_faults("train-base", history, read_events(history), list(search_log("train-base", log)))
    assert [finding.cause[:27] for finding in found] == ["Slurm ended the allocation ", "Slurm ended the processes o"]
