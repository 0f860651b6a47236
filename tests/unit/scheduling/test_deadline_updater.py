"""deadline.json follows Slurm's end of the allocation, by this host's clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longhaul.artifacts.job_state import Deadline, read_deadline
from longhaul.artifacts.paths import JobFolder
from longhaul.scheduling import deadline_updater
from longhaul.scheduling.deadline_updater import DeadlineUpdater
from longhaul.scheduling.slurm_client import JobInfo, SlurmCommandError

AHEAD_S = 7.0
RUNNING = JobInfo("RUNNING", 1, "n1", 1000.0, False)


class Slurm:
    """Answers in turn; the last answer is repeated. An answer may be an error that is raised."""

    def __init__(self, *answers: JobInfo | Exception | None) -> None:
        self.answers, self.asked = list(answers), threading.Event()
        self.job_ids: list[str] = []

    def job_info(self, job_id: str) -> JobInfo | None:
        self.job_ids.append(job_id)
        if len(self.answers) == 1:
            self.asked.set()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def use_slurm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Slurm]:
    """A function that makes Slurm give these answers. This host's clock is AHEAD_S ahead of slurmctld's."""

    def use(*answers: JobInfo | Exception | None) -> Slurm:
        slurm = Slurm(*answers)
        monkeypatch.setattr(deadline_updater, "job_info", slurm.job_info)
        monkeypatch.setattr(deadline_updater, "clock_offset_s", lambda: AHEAD_S)
        return slurm

    return use


def updated(folder: Path, slurm: Slurm) -> Deadline | None:
    """Run an updater until it has asked for the last answer. Return the deadline that it leaves."""
    with DeadlineUpdater("41", folder, 0.01):
        assert slurm.asked.wait(10)
    return read_deadline(folder)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (RUNNING, Deadline(1000.0 + AHEAD_S, False)),
        (JobInfo("RUNNING", 1, "n1", None, True), Deadline(None, True)),
        (JobInfo("CANCELLED", 1, "n1", 1000.0, False), None),
        (None, None),
    ],
)
def test_deadline_is_the_end_of_a_running_job_by_this_clock(
    tmp_path: Path, use_slurm: Callable[..., Slurm], answer: JobInfo | None, expected: Deadline | None
):
    slurm = use_slurm(answer)
    Deadline(5.0, True).write(JobFolder(tmp_path).deadline)  # of an earlier allocation
    assert updated(tmp_path, slurm) == expected
    assert set(slurm.job_ids) == {"41"}


def test_end_that_changes_replaces_the_deadline(tmp_path: Path, use_slurm: Callable[..., Slurm]):
    later = JobInfo("RUNNING", 1, "n1", 2000.0, False)
    assert updated(tmp_path, use_slurm(RUNNING, later)) == Deadline(2000.0 + AHEAD_S, False)


def test_cancelled_job_keeps_its_last_deadline(tmp_path: Path, use_slurm: Callable[..., Slurm]):
    slurm = use_slurm(RUNNING, JobInfo("COMPLETING", 1, "n1", 10.0, False))
    assert updated(tmp_path, slurm) == Deadline(1000.0 + AHEAD_S, False)


def test_unchanged_deadline_is_not_written_again(tmp_path: Path, use_slurm: Callable[..., Slurm]):
    slurm = use_slurm(RUNNING)
    path = JobFolder(tmp_path).deadline
    with DeadlineUpdater("41", tmp_path, 0.01):
        until = time.monotonic() + 10
        while not path.exists():
            assert time.monotonic() < until
        written, asked = path.stat().st_mtime_ns, len(slurm.job_ids)
        while len(slurm.job_ids) < asked + 3:
            assert time.monotonic() < until
    assert path.stat().st_mtime_ns == written


@pytest.mark.parametrize("error", [SlurmCommandError("no answer"), OSError("no answer")])
def test_error_gives_a_warning_and_the_updates_continue(
    tmp_path: Path, use_slurm: Callable[..., Slurm], capsys: pytest.CaptureFixture[str], error: Exception
):
    assert updated(tmp_path, use_slurm(error, RUNNING)) == Deadline(1000.0 + AHEAD_S, False)
    assert capsys.readouterr().out == "warning: deadline.json could not be updated: no answer\n"


def test_refresh_asks_without_waiting_for_the_interval(tmp_path: Path, use_slurm: Callable[..., Slurm]):
    slurm = use_slurm(RUNNING, RUNNING, RUNNING)
    started = time.monotonic()
    with DeadlineUpdater("41", tmp_path, 3600.0) as updater:
        for asked in (1, 2):
            while len(slurm.job_ids) < asked:
                assert time.monotonic() < started + 10
            time.sleep(0.05)
            assert len(slurm.job_ids) == asked, "the interval is an hour"
            updater.refresh_now()
        assert slurm.asked.wait(10)
    assert time.monotonic() < started + 10, "the thread ends at once"
    assert not [thread for thread in threading.enumerate() if "_run" in thread.name]
