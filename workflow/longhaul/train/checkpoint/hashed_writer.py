"""Files of a save that are hashed while they are written, and that end the save on all ranks alike when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError

from longhaul.errors import DISK_FULL


class HashedFile:
    """What torch.save needs of a file. It writes from front to back, so a hash can follow it.

    After a failed write the rest is counted and thrown away: the save goes on to its end, through the barriers that
    other ranks wait in, and the bytes that it would have needed are known.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0
        self.error: OSError | None = None
        self._hash, self._handle = hashlib.sha256(), -1
        self._guarded(self._open)

    def _open(self) -> None:
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.bytes += len(view)
        self._guarded(self._write, view)
        return len(view)

    def _write(self, view: memoryview) -> None:
        self._hash.update(view)
        while view:
            view = view[os.write(self._handle, view) :]

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Waits until the bytes are on the disk."""
        self._guarded(lambda: os.fsync(self._handle))
        if self._handle >= 0:
            os.close(self._handle)

    def _guarded(self, action: Any, *arguments: Any) -> None:
        if self.error is None:
            try:
                action(*arguments)
            except OSError as error:
                self.error = error

    def entry(self) -> dict[str, Any]:
        """The file's line in a manifest."""
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}


class HashedFiles(TorchCheckpointEngine):
    """DeepSpeed's way to write one file; what it wrote on this rank is in `files`."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[HashedFile] = []
        self.errors: list[OSError] = []

    def save(self, state_dict: Any, path: str | Path) -> None:
        stream = HashedFile(Path(path))
        self.files.append(stream)
        try:
            torch.save(state_dict, cast(IO[bytes], stream))
        finally:
            stream.close()

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Keeps an error of files that the block writes by other means, for `failure`."""
        try:
            yield
        except OSError as error:
            self.errors.append(error)
        except SafetensorError as error:  # its text alone holds the number
            found = re.search(r"os error (\d+)", str(error))
            self.errors.append(OSError(int(found[1]) if found else errno.EIO, str(error)))

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def failure(self) -> tuple[bool, str] | None:
        """(whether the disk is full, what went wrong) of the first error on this rank; None when all went well."""
        errors = [*(file.error for file in self.files if file.error), *self.errors]
        if not errors:
            return None
        full = [error for error in errors if error.errno in DISK_FULL]
        first = (full or errors)[0]
        return bool(full), str(first)
