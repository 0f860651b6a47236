"""Failure reports: the class of each error, and the text of a failing rank."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from longhaul.artifacts.job_state import ENVIRONMENT, PERMANENT, TRANSIENT, Failure, rank_failures
from longhaul.errors import DiskFull, InputError, UserError
from longhaul.runtime.failure_reports import classify_error, write_failure_report
from longhaul.runtime.process_rank import Rank

RANK = Rank(3, 4, 1, 2, "n2")


class OutOfMemoryError(RuntimeError):
    """Stands for torch.OutOfMemoryError: this test imports no torch."""


@pytest.mark.parametrize(
    ("error", "failure_class", "cause"),
    [
        (InputError("a bad row", "repair it"), PERMANENT, "a bad row"),
        (UserError("a damaged file", "restore it"), ENVIRONMENT, "a damaged file"),
        (OSError(errno.ENOSPC, "No space left on device", "/somewhere/file"), ENVIRONMENT, "disk full"),
        (PermissionError(errno.EACCES, "Permission denied", "/somewhere"), ENVIRONMENT, "/somewhere"),
        (OSError(errno.EFBIG, "File too large"), ENVIRONMENT, "File too large"),
        (OSError(errno.EMFILE, "Too many open files"), ENVIRONMENT, "Too many open files"),
        (MemoryError(), ENVIRONMENT, "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ENVIRONMENT, "out of memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), ENVIRONMENT, "out of memory"),
        (RuntimeError("can't start new thread"), ENVIRONMENT, "can't start new thread"),
        (OutOfMemoryError("CUDA out of memory"), PERMANENT, "out of memory"),
        (RuntimeError("connection reset by peer"), TRANSIENT, "connection reset"),
    ],
)
def test_class_of_an_error(error: Exception, failure_class: str, cause: str):
    failure = classify_error(error, RANK)
    assert bool(failure.remedy) == (failure_class != TRANSIENT)
    assert failure.failure_class == failure_class and cause in failure.cause
    assert (failure.rank, failure.host) == (3, "n2")


@pytest.mark.parametrize(("needed", "recorded"), [(500, 500), (0, 200 + 10**9)])
def test_full_disk_records_the_space_that_ends_the_failure(needed: int, recorded: int, tmp_path: Path):
    failure = classify_error(DiskFull("a checkpoint", tmp_path, needed, 200), RANK)
    assert (failure.needed_in, failure.needed_bytes) == (str(tmp_path), recorded)


def test_failure_of_a_full_disk_applies_until_space_is_free(tmp_path: Path):
    def failure(needed_bytes: int) -> Failure:
        needed = {"needed_in": str(tmp_path), "needed_bytes": needed_bytes}
        return Failure(ENVIRONMENT, "disk full", "", key="k", invocation="this", **needed)  # type: ignore[arg-type]

    assert failure(2**62).still_applies("k", "this") and not failure(1).still_applies("k", "this")
    assert not failure(2**62).still_applies("k", "the next main process")


def test_report_is_read_back_by_the_supervisor(tmp_path: Path):
    write_failure_report(tmp_path, RuntimeError("first"), Rank(1, 4, 1, 2, "n1"))
    write_failure_report(tmp_path, MemoryError(), RANK)
    assert [failure.rank for failure in rank_failures(tmp_path)] == [3, 1], "final failures come first"


def test_report_that_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    write_failure_report(tmp_path / "file", RuntimeError("first"), RANK)
    assert "n2: rank 3 cannot write to" in capsys.readouterr().out
