"""Failure reports: the class of each error, and the text of a failing rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.artifacts.job_state import PERMANENT, TRANSIENT, Failure, rank_failures
from longhaul.errors import DiskFull
from longhaul.runtime.failure_reports import classify_error, write_failure_report
from longhaul.runtime.process_rank import Rank

RANK = Rank(3, 4, 1, 2, "n2")


@pytest.mark.parametrize(
    ("error", "failure_class", "cause"),
    [
        (OSError(28, "No space left on device", "/somewhere/file"), PERMANENT, "disk full"),
        (MemoryError(), PERMANENT, "out of memory"),
        (RuntimeError("connection reset by peer"), TRANSIENT, "connection reset"),
    ],
)
def test_errors_that_would_recur_are_permanent(error: Exception, failure_class: str, cause: str):
    failure = classify_error(error, RANK)
    assert failure.failure_class == failure_class and cause in failure.cause
    assert (failure.rank, failure.host) == (3, "n2")


@pytest.mark.parametrize(("needed", "recorded"), [(500, 500), (0, 200 + 10**9)])
def test_full_disk_records_the_space_that_ends_the_failure(needed: int, recorded: int, tmp_path: Path):
    failure = classify_error(DiskFull("a checkpoint", tmp_path, needed, 200), RANK)
    assert (failure.needed_in, failure.needed_bytes) == (str(tmp_path), recorded)


def test_failure_of_a_full_disk_applies_until_space_is_free(tmp_path: Path):
    def failure(needed_bytes: int) -> Failure:
        return Failure(PERMANENT, "disk full", "", key="k", needed_in=str(tmp_path), needed_bytes=needed_bytes)

    assert failure(2**62).still_applies("k", "") and not failure(1).still_applies("k", "")


def test_report_is_read_back_by_the_supervisor(tmp_path: Path):
    write_failure_report(tmp_path, RuntimeError("first"), Rank(1, 4, 1, 2, "n1"))
    write_failure_report(tmp_path, MemoryError(), RANK)
    assert [failure.rank for failure in rank_failures(tmp_path)] == [3, 1], "permanent failures come first"


def test_report_that_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    write_failure_report(tmp_path / "file", RuntimeError("first"), RANK)
    assert "n2: rank 3 cannot write to" in capsys.readouterr().out
