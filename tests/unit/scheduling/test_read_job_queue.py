"""The jobs of a run are found in Slurm's queue."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from longhaul.artifacts.job_state import State
from longhaul.artifacts.paths import JobId, RunPaths
from longhaul.compat.slurm_plugin import job_comment, job_name_prefix
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_name_by_hand
from longhaul.jobs.launch_files import write_job_files
from longhaul.report.slurm_queue_types import Queue, QueuedJob
from longhaul.scheduling import read_job_queue, slurm_client
from longhaul.scheduling.read_job_queue import RecentQueue, jobs_in_queue, match_jobs, queue_asker
from longhaul.scheduling.slurm_client import QueueEntry, SlurmCommandError
from tests.support.small_configs import plan_of
from tests.support.supervised_job import fake_program

NAME_BY_PLUGIN = "longhaul-r_0b3aa5a6-6a1c-4d5c-9d3a-1f6f6f0e2b11"


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
    entries = [
        QueueEntry(str(k), "PENDING", "Priority", "N/A", NAME_BY_PLUGIN, comment) for k, comment in enumerate(comments)
    ]
    found = match_jobs("r", jobs, entries).by_job
    assert {name: job.job_id for name, job in found.items()} == {
        "train-a_b": "0",
        "encode-dataset-1-of-2": "1",
        "environment": "3",
    }
    assert found["train-a_b"] == QueuedJob("0", "PENDING", "Priority", "N/A")


def test_next_attempt_is_shown_while_slurm_still_ends_the_last_one():
    comment = job_comment("train", ("r", "base"))
    waits = QueueEntry("8", "PENDING", "Priority", "N/A", NAME_BY_PLUGIN, comment)
    ends = replace(waits, job_id="7", state="COMPLETING", reason="None")
    for entries in ([waits, ends], [ends, waits]):
        assert match_jobs("r", [JobId("train", ("base",))], entries).by_job["train-base"].job_id == "8"
    assert match_jobs("r", [JobId("train", ("base",))], [ends]).by_job["train-base"].job_id == "7"


@pytest.mark.parametrize(
    ("run", "stage", "name", "is_found"),
    [
        ("r", "a_b", NAME_BY_PLUGIN, True),
        ("r_a", "b", NAME_BY_PLUGIN, False),
        ("r", "a_b", "longhaul-r_a_f81d4fae-7dec-11d0-a765-00a0c91e6bf6", False),
        ("r_a", "b", "longhaul-r_a_f81d4fae-7dec-11d0-a765-00a0c91e6bf6", True),
        ("r", "a_b", "our-prefix_f81d4fae-7dec-11d0-a765-00a0c91e6bf6", True),
        ("r", "a_b", "longhaul-r_a.train-b", False),
    ],
    ids=["own", "other", "other's name", "own underscore", "prefix of the user", "other by hand"],
)
def test_two_runs_may_have_one_comment(
    run: str, stage: str, name: str, is_found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = QueueEntry("7", "RUNNING", "None", "N/A", name, "rule_train_wildcards_r_a_b")
    assert bool(match_jobs(run, [JobId("train", (stage,))], [entry]).by_job) == is_found
    paths = RunPaths(run, tmp_path / "results")
    paths.folder.mkdir(parents=True)
    monkeypatch.setattr(slurm_client, "queue_of", lambda *_: [entry])
    assert jobs_in_queue(paths) == (["7"] if is_found else [])


def test_a_run_with_a_long_name_finds_its_own_jobs_alone():
    """Stage `2_b` of one run and stage `b` of a run whose name ends in `_2` have one comment; both names are cut."""
    run, other = "r" * 60, "r" * 60 + "_2"
    comment = job_comment("train", (run, "2_b"))
    assert comment == job_comment("train", (other, "b"))
    for name in (run, other):
        entry = QueueEntry("7", "RUNNING", "None", "N/A", f"{job_name_prefix(name)}_{NAME_BY_PLUGIN[11:]}", comment)
        assert bool(match_jobs(run, [JobId("train", ("2_b",))], [entry]).by_job) == (name == run)
        assert bool(match_jobs(other, [JobId("train", ("b",))], [entry]).by_job) == (name == other)


def test_job_that_was_submitted_by_hand_is_found_by_its_name_or_its_recorded_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = write_job_files(plan, JobId("train", ("base",)), tmp_path)
    name = re.search(r"--job-name=(\S+)", folder.sbatch_script.read_text())
    assert name is not None
    entry = QueueEntry("7", "PENDING", "Priority", "N/A", name[1], "(null)")
    renamed = replace(entry, name="mine")
    found = match_jobs(plan.run, [JobId("train", ("base",))], [entry])
    assert found.by_job["train-base"].job_id == "7" and found.find("train-base", None) == found.by_job["train-base"]
    found = match_jobs(plan.run, [JobId("train", ("base",))], [renamed])
    assert found.find("train-base", "7") == found.by_id["7"] and found.find("train-base", "8") is None
    elsewhere = replace(entry, in_folder=False)
    assert match_jobs(plan.run, [JobId("train", ("base",))], [elsewhere]).by_job == {}
    for listed, ids in (([entry], ["7"]), ([elsewhere], [])):
        monkeypatch.setattr(slurm_client, "queue_of", lambda *_, listed=listed: listed)
        assert jobs_in_queue(plan.paths) == ids
    State("running", "7", "n1", ["n1"], 1, "2026-11-28T10:00:00+00:00").write(folder.state)
    assert jobs_in_queue(plan.paths) == ["7"], "its supervisor recorded the id"


def test_jobs_that_two_runs_submit_by_hand_have_different_names() -> None:
    """Each run has a job whose name, without a dot, would be longhaul-r-train-evaluate-x-trained-arc."""
    first, second = JobId("train", ("evaluate-x-trained-arc",)), JobId("evaluate", ("x", "trained", "arc"))
    name = job_name_by_hand("r", str(first))
    entry = QueueEntry("7", "RUNNING", "None", "N/A", name, "(null)")
    assert match_jobs("r", [first], [entry]).by_job[str(first)].job_id == "7"
    assert match_jobs("r-train", [second], [entry]).by_job == {}


def test_squeue_is_asked_once_and_jobs_of_other_folders_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths("r", tmp_path / "results")
    paths.folder.mkdir(parents=True)
    comment = "rule_train_wildcards_r_base"
    lines = [
        f"7|RUNNING|None|2026-11-28T10:00:00|{NAME_BY_PLUGIN}|{comment}|/elsewhere",
        f"8|PENDING|Resources|N/A|{NAME_BY_PLUGIN}|{comment}|{tmp_path.resolve()}",
        f"9|PENDING|Priority|N/A|other|a comment | with a bar|{tmp_path.resolve()}",
        "no job",
    ]
    calls: list[list[str]] = []

    def run(command: tuple[str, ...], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(list(command))
        return subprocess.CompletedProcess(command, 0, "\n".join(lines) + "\n", "")

    monkeypatch.setattr(slurm_client.subprocess, "run", run)
    found = queue_asker(paths)([JobId("train", ("base",))])
    assert found.by_job == {"train-base": QueuedJob("8", "PENDING", "Resources", "N/A")}
    assert list(found.by_id) == ["7", "8", "9"], "a job with a recorded id may work anywhere"
    assert len(calls) == 1 and f"--user={paths.folder.stat().st_uid}" in calls[0]


def test_status_waits_for_slurm_a_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunPaths("r", tmp_path / "results")
    paths.folder.mkdir(parents=True)
    monkeypatch.setenv("PATH", fake_program(tmp_path, "squeue", "#!/bin/sh\nexec sleep 30\n"))
    monkeypatch.setattr(read_job_queue, "_STATUS_TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match=r"squeue did not answer within 0\.2 s"):
        queue_asker(paths)([])


def test_display_asks_slurm_every_30_seconds_or_after_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = [0.0]
    monkeypatch.setattr(read_job_queue.time, "monotonic", lambda: clock_s[0])
    answers = iter([Queue({}), UserError("squeue did not answer"), Queue({}), Queue({})])

    def ask(jobs: list[JobId]) -> Queue:
        answer = next(answers)
        if isinstance(answer, UserError):
            raise answer
        return answer

    queue = RecentQueue(ask, 30.0)
    first = queue([])
    clock_s[0] = 29.0
    assert queue([]) is first
    for clock_s[0] in (30.0, 59.0):
        with pytest.raises(UserError, match="did not answer"):
            queue([])
    clock_s[0] = 60.0
    second = queue([])
    queue.forget()
    assert queue([]) is not second


def test_display_asks_again_about_a_job_that_was_submitted_during_the_question() -> None:
    calls = 0

    def ask(jobs: list[JobId]) -> Queue:
        nonlocal calls
        calls += 1
        if calls == 1:
            queue.forget()  # as another thread does
        return Queue({})

    queue = RecentQueue(ask, 30.0)
    for _ in range(3):
        queue([])
    assert calls == 2


def test_silent_slurm_is_reported_until_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunPaths("r", tmp_path / "results")
    paths.folder.mkdir(parents=True)

    def fail(*arguments: object) -> list[QueueEntry]:
        raise SlurmCommandError("squeue did not answer within 30 s")

    monkeypatch.setattr(slurm_client, "queue_of", fail)
    with pytest.raises(UserError, match=r"squeue did not answer .*\s+remedy: ask again later"):
        queue_asker(paths)([])
    monkeypatch.setattr(slurm_client, "queue_of", lambda *_: [])
    assert queue_asker(paths)([]) == Queue({})
