"""Writes the files of a checkpoint with threads, and hashes them meanwhile; limits how many files and parts a process writes at
once. An error of the file system ends no thread: it is kept.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3
from typing_extensions import Buffer

_FILES_AT_ONCE = 4
_PARTS_AT_ONCE = 8
_PART_BYTES = 32 << 20
_COPIED_BYTES = 1 << 20
"""Larger pieces of a file are not copied."""


class WriterThreads:
    """The threads of one rank that write checkpoints."""

    def __init__(self) -> None:
        self.is_stopped = threading.Event()
        self.save = ThreadPoolExecutor(1, "save")
        self.files = ThreadPoolExecutor(_FILES_AT_ONCE, "save-file")
        self.parts = ThreadPoolExecutor(_PARTS_AT_ONCE, "save-part")

    def stop(self) -> None:
        """Stop writing at the next part of a file, and end the threads."""
        self.is_stopped.set()
        for pool in (self.save, self.files, self.parts):
            pool.shutdown()


class HashedFile:
    """The part of a file's interface that torch.save uses. torch.save writes front to back, so a hash can follow it.

    After a failed write the rest is counted and dropped. So the number of bytes that the whole save needs is known.
    """

    def __init__(self, path: Path, threads: WriterThreads, is_kept: Callable[[memoryview], bool]) -> None:
        """is_kept: returns whether bytes stay as they are until the file is closed."""
        self.path, self.bytes = path, 0
        self.error: OSError | None = None
        self._threads, self._is_kept = threads, is_kept
        self._hash, self._hasher = blake3(), ThreadPoolExecutor(1, "save-hash")
        self._pending: list[Future[Any]] = []
        self._handle = -1
        self._unless_failed(self._open)

    def _open(self) -> None:
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, data: Buffer) -> int:
        """Begin to write and to hash the data."""
        view = memoryview(data).cast("B")
        offset, self.bytes = self.bytes, self.bytes + len(view)
        if self._threads.is_stopped.is_set():
            return len(view)
        if len(view) <= _COPIED_BYTES:
            copied = memoryview(bytes(view))
            self._hash_later(copied)
            self._unless_failed(self._write_at, copied, offset)
            return len(view)
        self._hash_later(view)
        for begin in range(0, len(view), _PART_BYTES):
            part = view[begin : begin + _PART_BYTES]
            self._pending.append(self._threads.parts.submit(self._unless_failed, self._write_at, part, offset + begin))
        if not self._is_kept(view):
            self._wait()
        return len(view)

    def _hash_later(self, view: memoryview) -> None:
        """Hash in a thread of its own, in order: torch.save computes a checksum of the next tensor in the meantime."""
        self._pending.append(self._hasher.submit(self._hash.update, view))

    def _write_at(self, view: memoryview, offset: int) -> None:
        begin, size = offset, len(view)
        while view:
            written = os.pwrite(self._handle, view, offset)
            view, offset = view[written:], offset + written
        if size == _PART_BYTES:
            # The kernel starts to write at once, and not only at fsync.
            with suppress(OSError):
                os.posix_fadvise(self._handle, begin, size, os.POSIX_FADV_DONTNEED)

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def flush(self) -> None:
        """Do nothing: writes are not buffered."""

    def close(self) -> None:
        """Wait until the bytes are on the disk, and close the file."""
        self._wait()
        self._hasher.shutdown()
        self._unless_failed(lambda: os.fsync(self._handle))
        if self._handle >= 0:
            self._free_space_if_failed()
            os.close(self._handle)

    def _free_space_if_failed(self) -> None:
        """Give back the space of an unusable file: training continues, and metrics.jsonl needs some."""
        if self.error and self._handle >= 0:
            with suppress(OSError):
                os.ftruncate(self._handle, 0)

    def _unless_failed(self, action: Callable[..., None], *arguments: object) -> None:
        """Run the action unless an earlier one failed or the threads are stopped; keep its error."""
        if self.error is None and not self._threads.is_stopped.is_set():
            try:
                action(*arguments)
            except OSError as error:
                self.error = error
                self._free_space_if_failed()

    def manifest_entry(self) -> dict[str, object]:
        """Return the closed file's entry in a manifest."""
        return {"bytes": self.bytes, "blake3": self._hash.hexdigest()}
