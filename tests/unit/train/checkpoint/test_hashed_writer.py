"""The files of a save: hashed while they are written, and the first error of a rank is the one that is reported."""

from __future__ import annotations

import errno
from pathlib import Path

from longhaul.artifacts.atomic_files import file_sha256
from longhaul.train.checkpoint.hashed_writer import HashingCheckpointEngine


def test_manifest_entries_are_those_of_the_files(tmp_path: Path):
    writer = HashingCheckpointEngine()
    writer.save({"a": 1}, tmp_path / "a.pt")
    path = tmp_path / "a.pt"
    assert [file.manifest_entry() for file in writer.files] == [
        {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    ]
    assert writer.failure() is None


def test_unwritable_folder_is_reported_and_not_the_file_that_misses_it(tmp_path: Path):
    writer = HashingCheckpointEngine()
    with writer.collect_errors():
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "step"))
    writer.save({"a": 1}, tmp_path / "step" / "a.pt")  # there is no such folder
    assert len(writer.errors) == 2
    is_full, text = writer.failure() or (True, "")
    assert not is_full and "Permission denied" in text


def test_full_disk_comes_before_other_errors(tmp_path: Path):
    writer = HashingCheckpointEngine()
    writer.save({"a": 1}, tmp_path / "missing" / "a.pt")
    with writer.collect_errors():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert writer.failure() == (True, "[Errno 28] No space left on device")
