"""Files that are hashed while several threads write them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, cast

import pytest
import torch
from blake3 import blake3

from longhaul.train.checkpoint import checkpoint_file_writer
from longhaul.train.checkpoint.checkpoint_file_writer import HashedFile, WriterThreads


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[WriterThreads]:
    monkeypatch.setattr(checkpoint_file_writer, "_PART_BYTES", 1 << 12)
    monkeypatch.setattr(checkpoint_file_writer, "_COPIED_BYTES", 1 << 10)
    threads = WriterThreads()
    yield threads
    threads.stop()


@pytest.mark.parametrize("keeps_tensors", [True, False])
def test_a_file_of_many_parts_is_complete_and_has_its_hash(threads: WriterThreads, tmp_path: Path, keeps_tensors: bool):
    """torch.save gives also views of its own memory, such as that of the pickle, which it uses again."""
    values = {"large": torch.arange(50_001), "small": torch.ones(3), "text": "x" * 5000}
    file = HashedFile(tmp_path / "file.pt", threads, lambda view: keeps_tensors and len(view) > 100_000)
    torch.save(values, cast(IO[bytes], file))
    file.close()
    found = (tmp_path / "file.pt").read_bytes()
    assert file.manifest_entry() == {"bytes": len(found), "blake3": blake3(found).hexdigest()}
    loaded = torch.load(tmp_path / "file.pt", weights_only=True)
    assert torch.equal(loaded["large"], values["large"]) and loaded["text"] == values["text"]


def test_bytes_that_change_later_are_written_as_they_were(threads: WriterThreads, tmp_path: Path):
    file = HashedFile(tmp_path / "file", threads, lambda _view: False)
    data = bytearray(b"a" * 100_000)
    file.write(data)
    data[:] = b"b" * 100_000
    file.close()
    assert (tmp_path / "file").read_bytes() == b"a" * 100_000


def test_a_failed_write_is_kept_and_the_rest_is_counted(
    threads: WriterThreads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    writes = []

    def fail(_handle: int, view: memoryview, offset: int) -> int:
        writes.append(offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with closing(HashedFile(tmp_path / "file", threads, lambda _view: True)) as file:
        for _ in range(3):
            file.write(bytes(500))
    assert file.bytes == 1500 and writes == [0]
    assert file.error and file.error.errno == errno.ENOSPC


def test_failed_file_gives_its_space_back_before_it_is_closed(
    threads: WriterThreads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Training continues until all ranks know of the failure, and writes metrics.jsonl on the same disk."""
    file = HashedFile(tmp_path / "file", threads, lambda _view: True)
    file.write(bytes(1000))  # small enough to be written by this thread, so nothing is pending
    assert (tmp_path / "file").stat().st_size == 1000

    def fail(_handle: int, _view: memoryview, _offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    file.write(bytes(500))
    assert (tmp_path / "file").stat().st_size == 0
    file.close()


def test_a_short_write_is_continued(threads: WriterThreads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usual = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, view, offset: usual(handle, view[:100], offset))
    with closing(HashedFile(tmp_path / "file", threads, lambda _view: True)) as file:
        file.write(bytes(range(250)) * 20)
    assert (tmp_path / "file").read_bytes() == bytes(range(250)) * 20


def test_a_folder_that_is_missing_is_an_error_of_the_file(threads: WriterThreads, tmp_path: Path):
    with closing(HashedFile(tmp_path / "missing/file", threads, lambda _view: True)) as file:
        file.write(bytes(5000))
    assert isinstance(file.error, FileNotFoundError) and file.bytes == 5000


def test_stopped_threads_write_nothing_more(tmp_path: Path):
    threads = WriterThreads()
    file = HashedFile(tmp_path / "file", threads, lambda _view: True)
    threads.is_stopped.set()
    file.write(bytes(100))
    file.close()
    threads.stop()
    assert (tmp_path / "file").read_bytes() == b"" and file.bytes == 100
