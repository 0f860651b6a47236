"""Records, the queue and logs of a run say why it fails or waits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longhaul.artifacts.job_state import Failure
from longhaul.report.diagnose import Finding, diagnose, findings_text, known_problems, match_line, search_log
from longhaul.report.run_status import QueuedJob
from tests.unit.report.test_run_status import TRAIN, RunFolder

EXAMPLES = Path(__file__).with_name("known_problems")


def test_every_known_problem_has_an_example_and_a_source() -> None:
    names = [problem["name"] for problem in known_problems()]
    assert sorted(names) == sorted(path.stem for path in EXAMPLES.glob("*.log")) and len(names) == len(set(names))
    assert all(problem["source"] and problem["remedy"] and problem["cause"] for problem in known_problems())


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.log")), ids=lambda path: path.stem)
def test_example_is_recognised(example: Path) -> None:
    """Also the most special problem is found, not one that is above it in the file."""
    ordinary, line = example.read_text().splitlines()
    problem = match_line(line)
    assert problem is not None and problem["name"] == example.stem and match_line(ordinary) is None
    (finding,) = search_log("train-base", example)
    assert finding.evidence == f"{example}:2: {line[:300]}" and finding.remedy == problem["remedy"]


def test_ordinary_lines_of_a_training_are_no_problem() -> None:
    for line in (
        "step 120/240  loss 5.0180  grad norm 0.713  lr 2.00e-04  6,170 tokens/s  1.2 min left",
        "step 120/240  validation loss 5.4538",
        "[2026-11-28 16:34:05,123] [INFO] [logging.py:107:log_dist] [Rank 0] DeepSpeed Final Optimizer = ZeroOptimizer",
        "using fused AdamW; 240 steps of 8 samples: 0.59 epochs of docstrings",
    ):
        assert match_line(line) is None, line


def log_of(run: RunFolder, *lines: str) -> Path:
    log = run.paths.log(TRAIN)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(f"{line}\n" for line in lines))
    return log


def found(run: RunFolder, **queue: QueuedJob) -> list[Finding]:
    return diagnose(run.paths, run.status(**queue), run.paths.results.parent / ".snakemake" / "slurm_logs")


def test_recorded_failure_comes_first_and_effects_come_last(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    Failure("permanent", "out of memory", "lower micro_batch_size", job_id="7").write(run.paths.job(TRAIN).failure)
    log = log_of(
        run,
        "RuntimeError: Connection closed by peer",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError: Connection closed by peer",
    )
    first, second, third = found(run)
    assert (first.cause, first.evidence) == ("out of memory", str(run.paths.job(TRAIN).failure))
    assert second.evidence.startswith(f"{log}:2: ") and second.job == "train-base"
    assert third.evidence.startswith(f"{log}:1: ") and third.follows and third.count == 2
    text = findings_text([first, second, third], run.status())
    assert text.startswith("1. train-base: out of memory.\n   evidence: ") and "remedy: lower micro_batch_size" in text
    assert "(2 times). This is usually the effect of another problem." in text


def test_pending_job_is_explained(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (finding,) = found(run, train_base=QueuedJob("8", "PENDING", "QOSMaxJobsPerUserLimit", "N/A"))
    assert finding.cause == "the job waits in Slurm's queue: QOSMaxJobsPerUserLimit"
    assert "QOS" in finding.remedy and finding.evidence == "squeue, job 8"


def test_handled_faults_are_named_with_their_number(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.state(TRAIN, "running")
    events = [
        {"time_s": 1.0, "event": "running", "reason": "", "job_id": "7"},
        {"time_s": 2.0, "event": "restarted", "reason": "rank 1 was killed", "job_id": "7"},
        {"time_s": 3.0, "event": "restarted", "reason": "rank 1 was killed", "job_id": "7"},
    ]
    run.paths.job(TRAIN).history.write_text("".join(json.dumps(event) + "\n" for event in events))
    (finding,) = found(run, train_base=QueuedJob("7", "RUNNING", "None", "N/A"))
    assert (finding.cause, finding.count) == ("rank 1 was killed", 2) and "the job continued" in finding.remedy


def test_log_of_sbatch_is_searched_by_job_id(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.state(TRAIN, "running")
    event = {"time_s": 1.0, "event": "running", "reason": "", "job_id": "7"}
    run.paths.job(TRAIN).history.write_text(json.dumps(event) + "\n")
    folder = run.paths.results.parent / ".snakemake" / "slurm_logs" / "rule_train" / "r_base"
    folder.mkdir(parents=True)
    for job_id in ("7", "8"):
        (folder / f"{job_id}.log").write_text(
            "*** JOB 7 ON n1 CANCELLED AT 2026-11-28T10:00:00 DUE TO TIME LIMIT ***\n"
        )
    causes = [finding.cause for finding in found(run) if "time limit" in finding.cause]
    assert causes == ["the job reached its time limit"]


def test_log_of_a_job_that_is_done_is_not_searched(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.state(TRAIN, "done")
    log_of(run, "RuntimeError: Connection closed by peer")
    assert found(run) == []
    assert findings_text([], run.status()) == "No problem found: run r is interrupted."


def test_only_the_end_of_a_huge_log_is_searched_with_right_line_numbers(tmp_path: Path) -> None:
    log = tmp_path / "huge.log"
    line = "x" * 99 + "\n"
    log.write_text("Permission denied\n" + line * 30_000 + "No space left on device\n")
    (finding,) = search_log("train-base", log)
    assert finding.evidence == f"{log}:30002: No space left on device"
