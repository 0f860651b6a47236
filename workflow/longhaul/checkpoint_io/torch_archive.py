"""Parses a `torch.save` file (zip and pickle) lazily for export and resharding: tensors stay on disk, and no code of the file
runs.

The file is a zip of stored (uncompressed) members: `data.pkl`, and one member `data/<key>` for each storage. The pickle
refers to storages by key, so the tree is built without reading them.
Source of the format: https://pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longhaul.errors import UserError

LOCAL_HEADER_BYTES = 30
"""Size of the fixed part of a zip member's local header (APPNOTE.TXT, section 4.3.7)."""
STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor in a file: `numel` elements of `dtype`, which start at byte `offset_bytes` of `path`."""

    path: Path
    offset_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class InertObject:
    """A harmless replacement for each class or function of a pickle that is not a plain container."""

    def __new__(cls, *args: object, **kwargs: object) -> InertObject:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def ignore(self, *args: object) -> None:
        pass

    __setstate__ = append = extend = add = __setitem__ = ignore


class _Dict(dict):
    """A replacement for OrderedDict that ignores attributes: a pickle could set attributes that replace its methods."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype


class _ArchiveUnpickler(pickle.Unpickler):
    """Builds containers, numbers, strings and StoredTensors; it imports nothing and calls nothing that the file chooses."""

    def __init__(self, archive: _Archive) -> None:
        instructions = archive.pickle_bytes()
        _check_memo(instructions)
        super().__init__(io.BytesIO(instructions))
        self._archive = archive

    def find_class(self, module_name: str, global_name: str) -> object:
        if module_name == "torch" and global_name in STORAGE_DTYPES:
            return _StorageType(STORAGE_DTYPES[global_name])
        return self._allowed().get((module_name, global_name), InertObject)

    def _allowed(self) -> dict[tuple[str, str], object]:
        """Return the replacements of the globals that a pickle of torch.save may name.

        The names with an underscore are part of the file format: torch.save writes them into each file.
        Every call returns new functions, because a pickle can set attributes of a function.
        """

        def tensor(*arguments: Any) -> object:
            return self._tensor(*arguments)

        return {
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, _type, args, _state: rebuild(*args),
            ("torch", "Size"): tuple,
            ("collections", "OrderedDict"): _Dict,
            ("builtins", "set"): set,
        }

    def persistent_load(self, pid: Any) -> object:
        kind, storage_type, key = pid[:3]
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            return InertObject()
        return _Storage(key, storage_type.dtype)

    def _tensor(self, storage: object, offset: int, shape: Iterable[int], stride: Iterable[int], *_: object) -> object:
        if not isinstance(storage, _Storage):
            return InertObject()
        return self._archive.tensor(storage, offset, tuple(shape), tuple(stride))


class _Archive:
    """The byte positions of the members of one torch.save file."""

    def __init__(self, path: Path, members: zipfile.ZipFile) -> None:
        self._path, self._members = path, members
        names = [name for name in members.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise zipfile.BadZipFile(f"it has {len(names)} data.pkl members instead of 1")
        self._prefix = names[0].removesuffix("data.pkl")
        byteorder = f"{self._prefix}byteorder"
        if byteorder in members.namelist() and members.read(byteorder) != b"little":
            raise zipfile.BadZipFile("its numbers are not little-endian")

    def pickle_bytes(self) -> bytes:
        return self._members.read(self._stored_member(f"{self._prefix}data.pkl"))

    def _stored_member(self, name: str) -> zipfile.ZipInfo:
        """Return a member; refuse a compressed one, whose size after decompression has no limit."""
        member = self._members.getinfo(name)
        if member.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"member {member.filename} is compressed")
        return member

    def tensor(self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> object:
        """Return a StoredTensor, or an InertObject for a tensor that is not contiguous: DeepSpeed saves no such weights."""
        if not all(type(size) is int and size >= 0 for size in (offset, *shape)):
            raise pickle.UnpicklingError(f"a tensor has offset {offset!r} and shape {shape!r}")
        if stride != _contiguous_stride(shape) and math.prod(shape) > 1:
            return InertObject()
        start, size = self._span(storage.key)
        tensor = StoredTensor(self._path, start + offset * storage.dtype.itemsize, storage.dtype, shape)
        if offset + tensor.numel > size // storage.dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {storage.key} is shorter than its tensor of shape {list(shape)}")
        return tensor

    def _span(self, key: str) -> tuple[int, int]:
        member = self._stored_member(f"{self._prefix}data/{key}")
        with self._path.open("rb") as stream:
            stream.seek(member.header_offset)
            header = stream.read(LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        return member.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes, member.file_size


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _check_memo(instructions: bytes) -> None:
    """Refuse a memo index beyond the size of the pickle: the unpickler allocates its memo up to the largest index."""
    for instruction, argument, _ in pickletools.genops(instructions):
        if instruction.name in ("PUT", "LONG_BINPUT") and not 0 <= (argument or 0) < len(instructions):
            raise pickle.UnpicklingError(
                f"its memo index {argument} exceeds the {len(instructions)} bytes of its pickle"
            )


def read_archive(path: Path) -> Any:
    """Return the saved object, with a StoredTensor for each tensor and an InertObject for everything but plain data.

    Raises:
        UserError: the file is missing, truncated or not a `torch.save` zip.
    """
    try:
        with zipfile.ZipFile(path) as members:
            return _ArchiveUnpickler(_Archive(path, members)).load()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "the checkpoint is incomplete: use another checkpoint") from None
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        RecursionError,
        ValueError,
        TypeError,
        struct.error,
    ) as error:
        hint = "the file is truncated or altered: use another checkpoint"
        raise UserError(f"{path} is not a readable torch checkpoint: {error}", hint) from None
