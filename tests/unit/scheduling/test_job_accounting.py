"""Slurm says how jobs have ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.report.ended_jobs import EndedJob
from longhaul.scheduling.job_accounting import ended_jobs
from tests.support.supervised_job import fake_program

SACCT = """#!/bin/sh
echo "$*" > "{log}"
echo "7|NODE_FAIL|0:0|2026-11-28T18:00:00|n[1-2]"
echo "8|CANCELLED by 1000|0:15|2026-11-28T18:05:00|n1"
echo "9|RUNNING|0:0|Unknown|n1"
"""


def test_accounting_says_how_jobs_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = tmp_path / "log"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "sacct", SACCT.format(log=log)))
    assert ended_jobs(["7", "8", "9"]) == {
        "7": EndedJob("NODE_FAIL", "0:0", "2026-11-28T18:00:00", "n[1-2]", "sacct -X -j 7"),
        "8": EndedJob("CANCELLED", "0:15", "2026-11-28T18:05:00", "n1", "sacct -X -j 8"),
    }
    assert "--jobs=7,8,9" in log.read_text()


def test_without_accounting_slurmctld_says_how_jobs_ended_lately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_program(tmp_path, "sacct", "#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2; exit 1\n")
    shown = "JobId=7 JobState=TIMEOUT NumNodes=2 NodeList=n[1-2] ExitCode=0:15 EndTime=2026-11-28T18:00:00"
    script = f'#!/bin/sh\nif [ "$4" = 7 ]; then echo "{shown}"; else echo "Invalid job id" >&2; exit 1; fi\n'
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", script))
    expected = EndedJob("TIMEOUT", "0:15", "2026-11-28T18:00:00", "n[1-2]", "scontrol show job 7")
    assert ended_jobs(["7", "8"]) == {"7": expected}


def test_jobs_are_unexplained_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ended_jobs(["7"]) == {}
