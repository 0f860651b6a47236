"""The jobs of a run are found in Slurm's queue."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from longhaul.artifacts.paths import JobId, RunPaths
from longhaul.errors import UserError
from longhaul.report.run_status import QueuedJob
from longhaul.scheduling import slurm_client
from longhaul.scheduling.job_queue import match_jobs, queue_asker
from longhaul.scheduling.slurm_client import QueueEntry, SlurmCommandError


def test_jobs_are_matched_by_rule_and_wildcards() -> None:
    """Names may contain the separator `_`: train of stage `a_b`, and encode of dataset `dataset`."""
    jobs = [
        JobId("train", ("a_b",)),
        JobId("train", ("a",)),
        JobId("encode", ("dataset", "1", "of", "2")),
        JobId("environment"),
    ]
    comments = [
        "rule_train_wildcards_r_a_b",
        "rule_encode_wildcards_r_dataset_1_2",
        "rule_train_wildcards_other_a",
        "rule_environment_wildcards_r",
        "",
    ]
    entries = [QueueEntry(str(k), "PENDING", "Priority", "N/A", comment) for k, comment in enumerate(comments)]
    found = match_jobs("r", jobs, entries)
    assert {name: job.job_id for name, job in found.items()} == {
        "train-a_b": "0",
        "encode-dataset-1-of-2": "1",
        "environment": "3",
    }
    assert found["train-a_b"] == QueuedJob("0", "PENDING", "Priority", "N/A")


def test_squeue_is_asked_once_and_jobs_of_other_folders_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths("r", tmp_path / "results")
    paths.folder.mkdir(parents=True)
    comment = "rule_train_wildcards_r_base"
    lines = [
        f"7|RUNNING|None|2026-11-28T10:00:00|{comment}|/elsewhere",
        f"8|PENDING|Resources|N/A|{comment}|{tmp_path.resolve()}",
        f"9|PENDING|Priority|N/A|a comment | with a bar|{tmp_path.resolve()}",
        "no job",
    ]
    calls: list[list[str]] = []

    def run(command: tuple[str, ...], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(list(command))
        return subprocess.CompletedProcess(command, 0, "\n".join(lines) + "\n", "")

    monkeypatch.setattr(slurm_client.subprocess, "run", run)
    found = queue_asker(paths)([JobId("train", ("base",))])
    assert found == {"train-base": QueuedJob("8", "PENDING", "Resources", "N/A")}
    assert len(calls) == 1 and f"--user={paths.folder.stat().st_uid}" in calls[0]


def test_silent_slurm_becomes_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunPaths("r", tmp_path / "results")
    paths.folder.mkdir(parents=True)

    def fail(*arguments: object) -> list[QueueEntry]:
        raise SlurmCommandError("squeue did not answer within 30 s")

    monkeypatch.setattr(slurm_client, "queue_of", fail)
    with pytest.raises(UserError, match="squeue did not answer"):
        queue_asker(paths)([])
