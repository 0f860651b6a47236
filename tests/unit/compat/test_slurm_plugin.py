"""The patched plugin: no job is forgotten, preempted jobs are requeued, and no account or partition is guessed."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longhaul.compat.slurm_plugin import SlurmActions, _after_pause, _patched, _without_guess, job_name_prefix


class Executor:
    """A stand-in for the plugin's executor, which reports ended jobs from within its check."""

    run_uuid = "run"

    def __init__(self, failed: str = "", succeeded: str = "", answers: bool = True) -> None:
        self.failed, self.succeeded, self.answers = failed, succeeded, answers
        self.reports: list[tuple[str, str]] = []

    def report_job_success(self, job: Any) -> None:
        self.reports.append(("success", job.external_jobid))

    def report_job_error(self, job: Any, msg: str = "") -> None:
        self.reports.append((msg or "error", job.external_jobid))

    async def check_active_jobs(self, active_jobs: list[Any]) -> AsyncGenerator[Any, None]:
        """Yield the active jobs; none, like the plugin, if no status query succeeds."""
        for job in active_jobs if self.answers else ():
            if job.external_jobid == self.failed:
                self.report_job_error(job)
            elif job.external_jobid == self.succeeded:
                self.report_job_success(job)
            else:
                yield job


class Slurm:
    """Records what the patch asks of Slurm."""

    def __init__(self, preempted: tuple[str, ...] = (), refusal: str = "") -> None:
        self.preempted, self.refusal = preempted, refusal
        self.asked: list[str] = []
        self.requeued: list[str] = []
        self.recorded: list[str] = []

    def preempted_jobs(self, name: str) -> tuple[str, ...]:
        self.asked.append(name)
        return self.preempted

    def requeue(self, job_id: str) -> str:
        self.requeued.append(job_id)
        return self.refusal

    def record_error(self, job: Any) -> None:
        self.recorded.append(job.external_jobid)

    def active_jobs(self, executor: Executor, *ids: str) -> list[str]:
        """Return the ids that one patched check yields."""
        jobs = [SimpleNamespace(external_jobid=job_id) for job_id in ids]
        actions = SlurmActions(self.preempted_jobs, self.requeue, self.record_error)

        async def check() -> list[str]:
            patched = _patched(Executor.check_active_jobs, actions)
            return [job.external_jobid async for job in patched(executor, jobs)]

        return asyncio.run(check())


def test_jobs_stay_active_if_no_status_query_succeeds():
    """Snakemake would wait without end for jobs that are not yielded."""
    executor = Executor(answers=False)
    assert Slurm().active_jobs(executor, "7", "8") == ["7", "8"]
    assert executor.reports == []


def test_ended_jobs_are_reported_once_and_not_yielded():
    slurm, executor = Slurm(), Executor(failed="7", succeeded="8")
    assert slurm.active_jobs(executor, "7", "8", "9") == ["9"]
    assert executor.reports == [("error", "7"), ("success", "8")]
    assert slurm.recorded == ["7"], "only errors are recorded"


def test_preempted_job_is_requeued_and_stays_active():
    slurm, executor = Slurm(preempted=("8",)), Executor()
    assert slurm.active_jobs(executor, "7", "8") == ["7", "8"]
    assert slurm.requeued == ["8"] and slurm.asked == [Executor.run_uuid] and executor.reports == []


def test_preempted_job_that_slurm_does_not_requeue_is_reported_as_failed():
    slurm, executor = Slurm(preempted=("8",), refusal="the site forbids requeue"), Executor()
    assert slurm.active_jobs(executor, "7", "8") == ["7"]
    ((message, job_id),) = executor.reports
    assert job_id == "8" and "the site forbids requeue" in message


def test_preempted_job_that_was_already_reported_is_not_requeued():
    slurm, executor = Slurm(preempted=("7",)), Executor(failed="7")
    assert slurm.active_jobs(executor, "7") == [] and slurm.requeued == []


def test_executor_reports_without_the_patch_afterwards():
    slurm, executor = Slurm(), Executor()
    slurm.active_jobs(executor, "7")
    executor.report_job_error(SimpleNamespace(external_jobid="7"))
    assert slurm.recorded == []


def test_named_account_and_partition_are_passed_on_and_others_are_not_guessed():
    def partition(executor: Any, job: Any) -> str:
        return f" -p {job.resources.get('slurm_partition', 'guessed')}"

    patched = _without_guess(partition, "slurm_partition", lambda: "")
    named, unnamed = (SimpleNamespace(resources=resources) for resources in ({"slurm_partition": "big"}, {}))
    assert (patched(None, named), patched(None, unnamed)) == (" -p big", "")


def test_the_plugin_still_guesses_what_a_job_does_not_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Still needed: once this fails, `send_no_guesses` can go."""
    from snakemake_executor_plugin_slurm import Executor

    for name, answer in (("sinfo", "PARTITION\nother\nmain*"), ("sacct", "proj"), ("sacctmgr", "proj")):
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\nprintf '{answer}\\n'\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    executor = SimpleNamespace(_fallback_partition=None, _partitions=None, _fallback_account_arg=None)
    executor.logger = SimpleNamespace(warning=lambda text: None)
    job = SimpleNamespace(resources={})
    partition, account = (
        getattr(method, "unpatched", method) for method in (Executor.get_partition_arg, Executor.get_account_arg)
    )
    assert partition(executor, job) == " -p main"
    assert list(account(executor, job)) == [" -A proj"]


class RefusedJobs:
    """Reports refused jobs through the patch, and notes what is recorded and reported."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s, self.recorded, self.reported = pause_s, [], []
        self.executor, self.has_reported = SimpleNamespace(wait=True), threading.Event()
        self._report = _after_pause(self._note, self._record)

    def _record(self, job: Any, message: str) -> float:
        self.recorded.append((job, message))
        return self.pause_s

    def _note(self, executor: Any, job_info: Any, message: str) -> None:
        self.reported.append((job_info.job, message))
        self.has_reported.set()

    def refuse(self, job: str) -> None:
        self._report(self.executor, SimpleNamespace(job=job), "refused")


def test_refused_job_is_recorded_at_once_and_reported_after_its_pause():
    jobs = RefusedJobs(pause_s=0.2)
    began_s = time.monotonic()
    jobs.refuse("j")
    assert jobs.recorded == [("j", "refused")]
    assert jobs.has_reported.wait(10) and time.monotonic() - began_s >= 0.2
    assert jobs.reported == [("j", "refused")]


def test_permanent_refusal_is_reported_at_once():
    jobs = RefusedJobs(pause_s=0)
    jobs.refuse("j")
    assert jobs.reported == [("j", "refused")]


def test_pauses_of_refused_jobs_do_not_block_the_threads_that_submit():
    """The plugin has two threads for all submissions."""
    jobs = RefusedJobs(pause_s=600)
    with ThreadPoolExecutor(max_workers=2) as pool:
        for name in ("a", "b", "c"):
            pool.submit(jobs.refuse, name)
        assert pool.submit(lambda: "submitted").result(timeout=10) == "submitted"
    assert len(jobs.recorded) == 3 and jobs.reported == []


def test_stopped_executor_gets_no_report_of_a_paused_job():
    """Its event loop is closed by then."""
    jobs = RefusedJobs(pause_s=0.05)
    jobs.executor.wait = False
    jobs.refuse("j")
    assert not jobs.has_reported.wait(0.3)


def test_nothing_is_asked_before_the_first_job(monkeypatch: pytest.MonkeyPatch):
    """The executor has no run_uuid yet. An error would end the thread that checks, and Snakemake would wait without end."""
    monkeypatch.delattr(Executor, "run_uuid")
    slurm, executor = Slurm(), Executor()
    assert slurm.active_jobs(executor) == [] and slurm.asked == []


def test_long_runs_that_begin_with_the_same_text_have_jobs_of_other_names():
    """The plugin accepts a prefix of these characters only, and of this length; a run's name has at most 64 characters."""
    runs = [f"{'llama-7b-web-and-code-with-long-warmup-seed-'.ljust(63, '-')}{number}" for number in (1, 2)]
    prefixes = [job_name_prefix(run) for run in runs]
    assert len({*prefixes}) == 2
    for run, prefix in zip(runs, prefixes, strict=True):
        assert re.fullmatch("[A-Za-z0-9_-]{50}", prefix) and prefix.startswith(f"longhaul-{run}"[:41] + "-")
        assert job_name_prefix(run) == prefix
    assert job_name_prefix("r" * 41) == "longhaul-" + "r" * 41, "a name that fits stays whole"
    assert len(job_name_prefix("r" * 42)) == 50
