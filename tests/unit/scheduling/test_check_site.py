"""`longhaul site check`: sbatch is asked once for each different request, and its answer is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.errors import UserError
from longhaul.scheduling.check_site import check_site, print_answers
from tests.support.small_configs import LOCAL, SITE, plan_of
from tests.support.supervised_job import fake_program

CORES = {"jobs": ["cpu"], "name": "cores", "account": "poor", "max_minutes": 60, "node": {"cpus": 8, "memory_mb": 8000}}
SBATCH = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
  *--account=poor*) echo "sbatch: error: Batch job submission failed: Invalid account" >&2; exit 1;;
esac
echo "sbatch: Job 24 to start at 2026-11-28T18:00:00 using 8 processors on nodes n1 in partition gpu" >&2
"""


def test_every_different_request_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    log = tmp_path / "log"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "sbatch", SBATCH.format(log=log)))
    gpu = {**SITE["partitions"][0], "jobs": ["gpu", "debug"]}
    found = check_site(plan_of(tmp_path, None, {"partitions": [gpu, CORES]}))
    calls = log.read_text().splitlines()
    assert len(calls) == len(found) and all(call.startswith("--test-only ") for call in calls)
    accepted = {answer.jobs: answer.is_accepted for answer in found}
    assert accepted == {
        "environment, fabric": True,
        "tokenizer, tokenize-chats, tokenize-prose": False,
        "train-base, train-chat": True,
        "controller": False,
    }
    refused = next(answer for answer in found if not answer.is_accepted)
    assert refused.text == "Batch job submission failed: Invalid account" and "correct account" in refused.remedy
    print_answers(found)
    printed = capsys.readouterr().out
    assert "NO" in printed and "correct account of the partition" in printed


def test_site_without_slurm_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="scheduler: local"):
        check_site(plan_of(tmp_path, None, LOCAL))
