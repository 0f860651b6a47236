"""Copies a save's tensors (weights, optimizer states) to pinned host memory, from which threads write files during training."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from longhaul.errors import UserError

_ALIGNMENT = 64
"""Bytes. Every tensor begins at a multiple of this."""


class HostMemory:
    """One block of host memory that holds the copies of one save at a time. It is reserved once and used by every save.

    Where training runs on a GPU, the block is locked, and the copies run on a stream of their own during the training.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block = np.empty(0, np.uint8)
        self._is_locked = False
        self._reservation: threading.Thread | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied = torch.cuda.Event() if self._stream else None

    @property
    def is_copied_later(self) -> bool:
        """Return whether a copy still runs during the training, so that its sources must not change yet."""
        return self._stream is not None

    def reserve(self, needed_bytes: int) -> None:
        """Begin to reserve at least this many bytes, in a thread: to lock 17 GB takes many seconds. No copy may be in use."""
        self._wait_for_reservation()
        if needed_bytes > self._block.nbytes:
            self._reservation = threading.Thread(target=self._reserve, args=(needed_bytes,), daemon=True)
            self._reservation.start()

    def copy(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies of the tensors. On a GPU they are complete only after `wait`, or after `delay_stream` for the stream.

        Raises:
            UserError: there is not enough memory.
        """
        needed_bytes = sum(_aligned(source.nbytes) for source in sources)
        self.reserve(needed_bytes)
        self._wait_for_reservation()
        if self._block.nbytes < needed_bytes:
            raise UserError(
                f"a copy of a save needs {needed_bytes / 1e9:.1f} GB of CPU memory, which this process cannot reserve",
                "lower node.memory_mb in the site file to the memory that jobs get: the plan then chooses synchronous saves",
            )
        copies = self._views(sources)
        if self._stream:
            # Everything that training has queued is done, on other streams and in host memory, too.
            torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream), torch.no_grad():
            for source, target in zip(sources, copies, strict=True):
                target.copy_(source, non_blocking=True)
                if source.is_cuda and self._stream:
                    source.record_stream(self._stream)  # else its memory could be used again too early
        if self._copied:
            self._copied.record(self._stream)
        return copies

    def wait(self) -> None:
        """Wait until the copies are complete."""
        if self._copied:
            self._copied.synchronize()

    def delay_stream(self) -> None:
        """Let the current stream wait until the copies are complete, so that training does not overwrite their sources."""
        if self._copied:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def holds(self, view: memoryview) -> bool:
        """Return whether the bytes are inside the block, so that they stay as they are until the next save."""
        begin = self._block.ctypes.data
        return begin <= np.frombuffer(view, np.uint8).ctypes.data < begin + self._block.nbytes

    def _views(self, sources: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Return contiguous tensors like the sources inside the block, each with a storage of its own."""
        views, offset = [], 0
        for source in sources:
            part = torch.from_numpy(self._block[offset : offset + source.nbytes])
            views.append(
                part.view(source.dtype).view(source.shape) if source.nbytes else torch.empty_like(source).cpu()
            )
            offset += _aligned(source.nbytes)
        return views

    def _reserve(self, needed_bytes: int) -> None:
        if self._is_locked:
            _cuda_runtime().cudaHostUnregister(self._block.ctypes.data)
        self._block = np.empty(0, np.uint8)  # the old block is freed before there is a new one
        try:
            self._block = np.empty(needed_bytes, np.uint8)
        except MemoryError:
            return  # `copy` raises it
        torch.from_numpy(self._block).zero_()  # the first access to a page takes longer than a copy
        if self._stream:
            with torch.cuda.device(self._device):
                error = int(_cuda_runtime().cudaHostRegister(self._block.ctypes.data, needed_bytes, 0))
            self._is_locked = error == 0
            if error:
                print(
                    f"warning: {needed_bytes / 1e9:.1f} GB of host memory cannot be locked (CUDA error {error}): "
                    "saves stop training for longer",
                    flush=True,
                )

    def _wait_for_reservation(self) -> None:
        if self._reservation:
            self._reservation.join()
            self._reservation = None


Kind = TypeVar("Kind")


class Snapshot:
    """The contents of a rank's files at one moment: `add` collects them, `copy` takes the copies.

    Equal tensors of a file, such as tied weights, are copied once and share their storage in the file, too.
    """

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._files: list[tuple[Path, object]] = []
        self._tensors: list[torch.Tensor] = []
        self._indices: dict[tuple[object, ...], int] = {}

    def add(self, path: Path, values: object) -> None:
        """Add a file. Its tensors must not change before `copy`; everything else is copied now."""
        self._files.append((path, _replace(values, torch.Tensor, self._index, copy.deepcopy)))

    @property
    def bytes(self) -> int:
        """Bytes of host memory that the copies need."""
        return sum(_aligned(tensor.nbytes) for tensor in self._tensors)

    def copy(self) -> list[tuple[Path, object]]:
        """Return path and contents of every file, with tensors in host memory."""
        copies = self._memory.copy(self._tensors)
        self._tensors = []
        return [
            (path, _replace(values, _Index, lambda index: copies[index.value], lambda value: value))
            for path, values in self._files
        ]

    def _index(self, tensor: torch.Tensor) -> _Index:
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        index = self._indices.setdefault(key, len(self._tensors))
        if index == len(self._tensors):
            self._tensors.append(tensor)
        return _Index(index)


class _Index:
    """The place of a tensor in the list of a snapshot's tensors."""

    def __init__(self, value: int) -> None:
        self.value = value


def _replace(
    values: Any, kind: type[Kind], replacement: Callable[[Kind], object], convert_other: Callable[[object], object]
) -> object:
    """Return a copy of nested dicts, lists and tuples with every object of `kind` replaced."""
    if isinstance(values, kind):
        return replacement(values)
    if isinstance(values, dict):
        replaced = copy.copy(values)  # keeps the class, and what state_dict() stores as an attribute
        for key, value in values.items():
            replaced[key] = _replace(value, kind, replacement, convert_other)
        return replaced
    if type(values) in (list, tuple):
        return type(values)(_replace(value, kind, replacement, convert_other) for value in values)
    return convert_other(values)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _cuda_runtime() -> Any:
    """Return torch's module of CUDA runtime functions; torch's own pinned tensors take up a power of two."""
    return torch.cuda.cudart()
