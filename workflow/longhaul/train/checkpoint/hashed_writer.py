"""Files of a save that are hashed while they are written. A full disk ends the save on all ranks in the same way."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError

from longhaul.errors import DISK_FULL_ERRNOS


class HashedFile:
    """The part of a file's interface that torch.save uses. torch.save writes front to back, so a hash can follow it.

    After a failed write the rest is counted and dropped. The save continues to its end, through the barriers in which other
    ranks wait, and the number of bytes that it needs is known.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0
        self.error: OSError | None = None
        self._hash, self._handle = hashlib.sha256(), -1
        self._unless_failed(self._open)

    def _open(self) -> None:
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.bytes += len(view)
        self._unless_failed(self._write, view)
        return len(view)

    def _write(self, view: memoryview) -> None:
        self._hash.update(view)
        while view:
            view = view[os.write(self._handle, view) :]

    def flush(self) -> None:
        """Do nothing: writes are not buffered."""

    def close(self) -> None:
        """Wait until the bytes are on the disk, and close the file."""
        self._unless_failed(lambda: os.fsync(self._handle))
        if self._handle >= 0:
            os.close(self._handle)

    def _unless_failed(self, action: Callable[..., None], *arguments: Any) -> None:
        """Run the action unless an earlier one failed; keep its error."""
        if self.error is None:
            try:
                action(*arguments)
            except OSError as error:
                self.error = error

    def manifest_entry(self) -> dict[str, Any]:
        """Return the file's entry in a manifest."""
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}


class HashingCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's interface for writing one file; `files` lists what this rank wrote through it."""

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
        """Return (whether the disk is full, the error) of the first error on this rank; None if there was none."""
        errors = [*(file.error for file in self.files if file.error), *self.errors]
        if not errors:
            return None
        full = [error for error in errors if error.errno in DISK_FULL_ERRNOS]
        first = (full or errors)[0]
        return bool(full), str(first)
