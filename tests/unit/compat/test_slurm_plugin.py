"""What the patched executor makes of a job that its user cancelled in the queue."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longhaul.artifacts.job_state import CANCELLED, read_failure
from longhaul.compat.slurm_plugin import _mended
from longhaul.scheduling.resource_requests import final_failure
from tests.unit.scheduling.test_supervisor import job

SCONTROL = (
    "#!/bin/sh\necho 'JobId=7 JobState={state} Reason=None NumNodes=2 NodeList={nodes} EndTime=2030-01-01T00:00:00'\n"
)


class Executor:
    """As the plugin's: reports jobs from within its check."""

    run_uuid = "run"

    def __init__(self) -> None:
        self.errors: list[Any] = []

    def report_job_success(self, job: Any) -> None:
        raise AssertionError

    def report_job_error(self, job: Any, msg: str = "") -> None:
        self.errors.append(job)

    async def check_active_jobs(self, active_jobs: list[Any]) -> AsyncGenerator[Any, None]:
        for active in active_jobs:
            self.report_job_error(active, msg="it failed")
            if active.external_jobid is None:
                yield active


@pytest.mark.parametrize(
    ("state", "nodes", "is_final"),
    [
        ("CANCELLED", "(null)", True),
        ("CANCELLED", "", True),
        ("CANCELLED", "n[1-2]", False),
        ("FAILED", "(null)", False),
    ],
)
def test_a_job_cancelled_in_the_queue_is_not_tried_again(
    state: str, nodes: str, is_final: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A job that had begun has a supervisor, which says itself how it ended."""
    program = tmp_path / "bin/scontrol"
    program.parent.mkdir()
    program.write_text(SCONTROL.format(state=state, nodes=nodes))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    folder = Path(job(tmp_path, "").folder)
    (tmp_path / "results/small.lease.json").write_text("this main")
    submitted = SimpleNamespace(
        external_jobid="7", job=SimpleNamespace(params={"launch": f"{folder}/launch.sh"}), aux={}
    )
    executor = Executor()

    async def still_active() -> list[Any]:
        return [found async for found in _mended(Executor.check_active_jobs, lambda job_id: "")(executor, [submitted])]

    assert asyncio.run(still_active()) == [] and executor.errors == [submitted]
    assert bool(final_failure(folder)) == is_final
    failure = read_failure(folder)
    assert (failure is not None and failure.failure_class == CANCELLED and "in the queue" in failure.cause) == is_final
