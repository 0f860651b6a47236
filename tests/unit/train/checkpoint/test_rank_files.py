"""The first error of a rank's save is the one that is reported, not those that follow from it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from longhaul.train.checkpoint.checkpoint_file_writer import WriterThreads
from longhaul.train.checkpoint.rank_files import RankFiles


@pytest.fixture
def files() -> Iterator[RankFiles]:
    threads = WriterThreads()
    yield RankFiles(threads, None)
    threads.stop()


def test_unwritable_folder_is_reported_and_not_the_file_that_misses_it(files: RankFiles, tmp_path: Path):
    with files.collect_errors():
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "step"))
    files.save({"a": 1}, tmp_path / "step" / "a.pt")  # there is no such folder
    assert files.files[0].error and files.files[0].error.errno == errno.ENOENT
    is_full, text = files.failure() or (True, "")
    assert not is_full and "Permission denied" in text


def test_full_disk_comes_before_other_errors(files: RankFiles, tmp_path: Path):
    files.save({"a": 1}, tmp_path / "missing" / "a.pt")
    with files.collect_errors():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert files.failure() == (True, "[Errno 28] No space left on device")
