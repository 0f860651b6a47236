"""Disks are measured with files that are removed again, also when the disk is full or does not support direct I/O."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from longhaul.checks.disk_speed import BLOCK_BYTES, direct_speed, safe_write


def test_direct_reads_and_writes_have_rates(tmp_path: Path):
    found = direct_speed(tmp_path / "scratch", 2 * BLOCK_BYTES, 10)
    assert found.error == "" and 0 < found.write_gb_per_s < 1000 and 0 < found.read_gb_per_s < 1000
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(("changed_read", "is_corrupt"), [(6, True), (9, False)])
def test_other_bytes_than_were_written_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed_read: int, is_corrupt: bool
):
    """One bit of the second of four blocks differs when they are verified, after the four timed reads."""
    reads: list[int] = []

    def read(handle: int, blocks: list[bytearray], readv: Any = os.readv) -> int:
        reads.append(readv(handle, blocks))
        if len(reads) == changed_read:
            blocks[0][12345] ^= 1
        return reads[-1]

    monkeypatch.setattr(os, "readv", read)
    found = direct_speed(tmp_path, 4 * BLOCK_BYTES, 10)
    assert (found.error, found.is_corrupt) == ("", is_corrupt)
    assert len(reads) == (6 if is_corrupt else 8) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("read_instead", [0, None], ids=["the first block", "nothing"])
def test_other_block_than_was_asked_for_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_instead: int | None
):
    """The third of four blocks is verified with the seventh read."""
    reads: list[int] = []

    def read(handle: int, blocks: list[bytearray], readv: Any = os.readv, preadv: Any = os.preadv) -> int:
        reads.append(handle)
        if len(reads) == 7:
            return 0 if read_instead is None else preadv(handle, blocks, read_instead * BLOCK_BYTES)
        return readv(handle, blocks)

    monkeypatch.setattr(os, "readv", read)
    assert direct_speed(tmp_path, 4 * BLOCK_BYTES, 10).is_corrupt


def test_rate_is_that_of_the_moved_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three readings of the clock: start, before the only block, and after fsync."""
    times = iter([0.0, 0.0, 0.5] * 2)
    monkeypatch.setattr("longhaul.checks.disk_speed.time.perf_counter", lambda: next(times))
    found = direct_speed(tmp_path, BLOCK_BYTES, 10)
    assert found.write_gb_per_s == found.read_gb_per_s == round(BLOCK_BYTES / 0.5 / 1e9, 4)


def test_slow_disk_ends_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seconds = iter(range(100))
    monkeypatch.setattr("longhaul.checks.disk_speed.time.perf_counter", lambda: next(seconds))
    written: list[int] = []
    monkeypatch.setattr(
        os, "write", lambda handle, block, write=os.write: written.append(write(handle, block)) or BLOCK_BYTES
    )
    direct_speed(tmp_path, 50 * BLOCK_BYTES, limit_s=3)
    assert len(written) == 2


@pytest.fixture
def quota():
    """Lets files grow to 1 MiB only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_an_error_and_leaves_no_file(tmp_path: Path, quota: None):
    assert direct_speed(tmp_path, 2 * BLOCK_BYTES, 10).error == "File too large"
    found = safe_write(tmp_path, 2 * 2**20)
    assert found.seconds is None and found.error == "File too large" and not found.is_corrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "is_full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_disk_without_space_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_full: bool):
    def refuse(handle: int, block: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", refuse)
    found = direct_speed(tmp_path, BLOCK_BYTES, 10)
    assert (found.error, found.is_full) == (os.strerror(number), is_full)
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_direct_io_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: object, flags: int, mode: int = 0) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "open", refuse)
    assert direct_speed(tmp_path, BLOCK_BYTES, 10).error == "Invalid argument"


def test_safe_write_takes_a_time_and_leaves_no_file(tmp_path: Path):
    found = safe_write(tmp_path, 2**20)
    assert found.seconds and 0 < found.seconds < 60 and not found.is_corrupt and found.error == ""
    assert list(tmp_path.iterdir()) == []


def test_other_bytes_than_written_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"other")
    assert safe_write(tmp_path, 1000).is_corrupt
