"""Collects and writes the files of one rank in a save through DeepSpeed's checkpoint engine; a full disk ends it on all ranks."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError

from longhaul.errors import DISK_FULL_ERRNOS
from longhaul.train.checkpoint.checkpoint_file_writer import HashedFile, WriterThreads
from longhaul.train.checkpoint.host_snapshot import HostMemory, Snapshot


class RankFiles(TorchCheckpointEngine):
    """DeepSpeed's interface for writing one file; `files` lists what this rank wrote through it.

    With host memory, `save` only collects the contents; `take_snapshot` copies them, and `write` writes them in the background.
    Without host memory, `save` writes.
    """

    def __init__(self, threads: WriterThreads, memory: HostMemory | None) -> None:
        super().__init__()
        self.files: list[HashedFile] = []
        self.errors: list[OSError] = []
        self._threads, self._memory = threads, memory
        self._snapshot = Snapshot(memory) if memory else None
        self._contents: list[tuple[Path, object]] = []

    def save(self, state_dict: object, path: str | Path) -> None:
        if self._snapshot:
            self._snapshot.add(Path(path), state_dict)
        else:
            self._write_file(Path(path), state_dict)

    def makedirs(self, path: object, exist_ok: bool = False) -> None:
        """Do nothing: the folder of the save exists already."""

    def create(self, info: object) -> None:
        """Do nothing: DeepSpeed's own method only writes to the log."""

    def preserves_storage_sharing(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return whether a view is saved with its whole storage. A snapshot copies views, so DeepSpeed need not do it."""
        return self._snapshot is None

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of host memory that the collected contents need."""
        return self._snapshot.bytes if self._snapshot else 0

    def take_snapshot(self) -> None:
        """Copy what was collected to the host memory; from now on training may change it (HostMemory.delay_stream)."""
        if self._snapshot:
            self._contents, self._snapshot = self._snapshot.copy(), None

    def write(self) -> None:
        """Write the files of the snapshot, several at once."""
        if self._memory:
            self._memory.wait()
        written = [self._threads.files.submit(self._write_file, *file) for file in self._contents]
        for future in written:
            future.result()
        self._contents = []

    def _write_file(self, path: Path, values: object) -> None:
        stream = HashedFile(path, self._threads, self._memory.holds if self._memory else lambda _view: False)
        self.files.append(stream)
        try:
            torch.save(values, cast(IO[bytes], stream))
        finally:
            stream.close()

    @contextmanager
    def collect_errors(self) -> Iterator[None]:
        """Keep an error of files that the block writes in other ways, for `failure`."""
        try:
            yield
        except OSError as error:
            self.errors.append(error)
        except SafetensorError as error:  # the error number is only in its text
            match = re.search(r"os error (\d+)", str(error))
            self.errors.append(OSError(int(match[1]) if match else errno.EIO, str(error)))

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def failure(self) -> tuple[bool, str] | None:
        """Return (whether the disk is full, the error) of the first error on this rank; None if there was none.

        An error of the folder comes before those of files: without a folder, no file can be opened.
        """
        errors = [*self.errors, *(file.error for file in self.files if file.error)]
        if not errors:
            return None
        full = [error for error in errors if error.errno in DISK_FULL_ERRNOS]
        first = (full or errors)[0]
        return bool(full), str(first)
