"""A job that its user cancels in the queue is not retried."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from longhaul.artifacts.job_state import CANCELLED, read_failure
from longhaul.errors import UserError
from longhaul.scheduling import slurm_client
from longhaul.scheduling.cancelled_jobs import record_cancelled_wait
from longhaul.scheduling.retry_policy import final_failure
from longhaul.scheduling.slurm_client import JobInfo, SlurmCommandError
from tests.support.supervised_job import fake_program, write_job

SCONTROL = (
    "#!/bin/sh\necho 'JobId=7 JobState={state} Reason=None NumNodes=2 NodeList={nodes} EndTime=2030-01-01T00:00:00'\n"
)


@pytest.mark.parametrize(
    ("state", "nodes", "is_recorded"),
    [
        ("CANCELLED", "(null)", True),
        ("CANCELLED", "", True),
        ("CANCELLED", "n[1-2]", False),
        ("FAILED", "(null)", False),
    ],
)
def test_only_a_job_cancelled_before_its_start_is_recorded(
    state: str, nodes: str, is_recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The supervisor of a job that has started records the cause itself."""
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", SCONTROL.format(state=state, nodes=nodes)))
    folder = Path(write_job(tmp_path, "").folder)
    (tmp_path / "results/small.lease.json").write_text("this main")
    job = SimpleNamespace(params={"launch": f"{folder}/launch.sh"})
    record_cancelled_wait(SimpleNamespace(external_jobid="7", job=job))
    assert bool(final_failure(folder)) == is_recorded
    failure = read_failure(folder)
    assert (
        failure is not None and failure.failure_class == CANCELLED and "in the queue" in failure.cause
    ) == is_recorded


def cancelled(launch: str | None) -> SimpleNamespace:
    """Return Snakemake's view of job 7 with this launch script."""
    return SimpleNamespace(external_jobid="7", job=SimpleNamespace(params={"launch": launch} if launch else {}))


def test_record_has_cause_remedy_job_and_main_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    info = JobInfo("CANCELLED", 1, "", None, False)
    monkeypatch.setattr(slurm_client, "job_info", lambda job_id: asked.append(job_id) or info)
    folder = Path(write_job(tmp_path, "").folder)
    (tmp_path / "results/small.lease.json").write_text("this main")
    record_cancelled_wait(cancelled(f"{folder}/launch.sh"))
    failure = read_failure(folder)
    assert asked == ["7"] and failure
    assert (failure.failure_class, failure.job_id, failure.invocation) == (CANCELLED, "7", "this main")
    assert failure.cause == "job 7 was cancelled by scancel while it waited in the queue"
    assert failure.remedy == "run it again to resume"


@pytest.mark.parametrize("answer", [None, SlurmCommandError("no answer"), UserError("no scontrol")])
def test_job_without_an_answer_of_slurm_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Exception | None
):
    def job_info(job_id: str) -> None:
        if answer:
            raise answer

    monkeypatch.setattr(slurm_client, "job_info", job_info)
    folder = Path(write_job(tmp_path, "").folder)
    record_cancelled_wait(cancelled(f"{folder}/launch.sh"))
    assert read_failure(folder) is None


def test_job_without_a_launch_script_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_client, "job_info", lambda job_id: JobInfo("CANCELLED", 1, "", None, False))
    record_cancelled_wait(cancelled(None))
    assert list(tmp_path.rglob("*")) == []
