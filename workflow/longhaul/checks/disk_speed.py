"""Measures how fast a node writes and reads its local disk without the page cache, and writes a file safely to the run folder."""

from __future__ import annotations

import errno
import mmap
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from longhaul.checks.measurement_types import DiskSpeed, SafeWrite

BLOCK_BYTES = 4 * 2**20
_VERIFICATION_S = 1.0
_NUMBER_BYTES = 8
"""Each block begins with its number, so that the bytes of another block are wrong, too."""


def direct_speed(folder: Path, size_bytes: int, limit_s: float) -> DiskSpeed:
    """Write and read a file with O_DIRECT, which goes past the page cache, at most `limit_s` seconds each; then verify it.

    size_bytes: a multiple of BLOCK_BYTES
    """
    path = folder / f".disk-test-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with mmap.mmap(-1, BLOCK_BYTES) as block:  # O_DIRECT needs aligned memory
            data = os.urandom(BLOCK_BYTES)  # some disks compress
            block.write(data)
            blocks = size_bytes // BLOCK_BYTES

            def write_block(handle: int, number: int) -> int:
                block[:_NUMBER_BYTES] = _number_bytes(number)
                return os.write(handle, block)

            write, written = _rate(path, os.O_CREAT | os.O_WRONLY, write_block, blocks, limit_s)
            read, _ = _rate(path, os.O_RDONLY, lambda handle, _: os.readv(handle, [block]), written, limit_s)
            return DiskSpeed(write, read, is_corrupt=_has_other_bytes(path, block, data, written))
    except OSError as error:
        return DiskSpeed(0.0, 0.0, error.strerror or str(error), error.errno in (errno.ENOSPC, errno.EDQUOT))
    finally:
        with suppress(OSError):
            path.unlink()


def _has_other_bytes(path: Path, block: mmap.mmap, data: bytes, blocks: int) -> bool:
    """Read the file again, for a second at most, and return whether a block differs. To compare takes as long as to read."""
    handle, end = os.open(path, os.O_RDONLY | os.O_DIRECT), time.monotonic() + _VERIFICATION_S
    rest = data[_NUMBER_BYTES:]
    try:
        for number in range(blocks):
            block[:_NUMBER_BYTES] = bytes(_NUMBER_BYTES)  # a read that returns nothing is wrong, too
            os.readv(handle, [block])
            if block[:_NUMBER_BYTES] != _number_bytes(number) or block[_NUMBER_BYTES:] != rest:
                return True
            if time.monotonic() >= end:
                break
        return False
    finally:
        os.close(handle)


def _number_bytes(number: int) -> bytes:
    return (number + 1).to_bytes(_NUMBER_BYTES, "little")  # never 0


def _rate(
    path: Path, flags: int, move_block: Callable[[int, int], int], blocks: int, limit_s: float
) -> tuple[float, int]:
    """Return GB/s, and how many blocks were moved within the limit. move_block: of a file and a number of a block"""
    handle = os.open(path, flags | os.O_DIRECT, 0o600)
    try:
        started, moved_bytes, done = time.perf_counter(), 0, 0
        while done < blocks and time.perf_counter() - started < limit_s:
            moved_bytes += move_block(handle, done)
            done += 1
        os.fsync(handle)
        return round(moved_bytes / (time.perf_counter() - started) / 1e9, 4), done
    finally:
        os.close(handle)


def safe_write(folder: Path, size_bytes: int) -> SafeWrite:
    """Write a file, make it durable (fsync), rename it and read it again: the steps of each file of a checkpoint."""
    data, path = os.urandom(size_bytes), folder / f".speed-test-{uuid.uuid4().hex}"
    renamed = path.with_suffix(".renamed")
    started = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        path.rename(renamed)
        is_corrupt = renamed.read_bytes() != data
        return SafeWrite(round(time.perf_counter() - started, 4), is_corrupt)
    except OSError as error:
        return SafeWrite(None, error=error.strerror or str(error))
    finally:
        for left in (path, renamed):
            with suppress(OSError):
                left.unlink()
