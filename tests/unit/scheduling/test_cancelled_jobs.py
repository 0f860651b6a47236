"""A job that its user cancels in the queue is not retried."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from longhaul.artifacts.job_state import CANCELLED, read_failure
from longhaul.scheduling.cancelled_jobs import record_cancelled_wait
from longhaul.scheduling.retry_policy import final_failure
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
