"""A `torch.save` file as a tree of Python values whose tensors stay on disk.

The file is a zip of stored (uncompressed) members: `data.pkl` and one member per storage, `data/<key>`. The pickle names
the storages by key, so it can be walked without reading them. https://pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longhaul.errors import UserError

LOCAL_HEADER_BYTES = 30
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
    """Where a contiguous tensor's elements lie: `numel` elements of `dtype` from byte `offset_bytes` of `path`."""

    path: Path
    offset_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Inert:
    """Stands in for every class or function of a pickle that is not a plain container: it does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def ignore(self, *args: Any) -> None:
        pass

    __setstate__ = append = extend = add = __setitem__ = ignore


class _Dict(dict):
    """Stands in for OrderedDict: attributes that a pickle would set on it, over its methods even, are ignored."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype


class _Unpickler(pickle.Unpickler):
    """Builds containers, numbers, strings and StoredTensors; nothing is imported and no code of the file's choice runs."""

    def __init__(self, archive: _Archive) -> None:
        instructions = archive.pickle_bytes()
        _check_memo(instructions)
        super().__init__(io.BytesIO(instructions))
        self._archive = archive

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "torch" and global_name in STORAGE_DTYPES:
            return _StorageType(STORAGE_DTYPES[global_name])
        return self._allowed().get((module_name, global_name), Inert)

    def _allowed(self) -> dict[tuple[str, str], Any]:
        """Made anew for each use: a pickle may set attributes of functions, and these go with it."""

        def tensor(*arguments: Any) -> Any:
            return self._tensor(*arguments)

        return {
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch._tensor", "_rebuild_from_type_v2"): lambda make, _type, args, _state: make(*args),
            ("torch", "Size"): tuple,
            ("collections", "OrderedDict"): _Dict,
            ("builtins", "set"): set,
        }

    def persistent_load(self, pid: Any) -> Any:
        kind, storage_type, key = pid[:3]
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            return Inert()
        return _Storage(key, storage_type.dtype)

    def _tensor(self, storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> Any:
        if not isinstance(storage, _Storage):
            return Inert()
        return self._archive.tensor(storage, offset, tuple(shape), tuple(stride))


class _Archive:
    """Byte positions of the members of one torch.save file."""

    def __init__(self, path: Path, members: zipfile.ZipFile) -> None:
        self._path, self._members = path, members
        names = [name for name in members.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise zipfile.BadZipFile(f"it has {len(names)} data.pkl members")
        self._prefix = names[0].removesuffix("data.pkl")
        byteorder = f"{self._prefix}byteorder"
        if byteorder in members.namelist() and members.read(byteorder) != b"little":
            raise zipfile.BadZipFile("its numbers are not little-endian")

    def pickle_bytes(self) -> bytes:
        return self._members.read(self._stored_member(f"{self._prefix}data.pkl"))

    def _stored_member(self, name: str) -> zipfile.ZipInfo:
        """A member that is as large in the file as it says."""
        member = self._members.getinfo(name)
        if member.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"member {member.filename} is compressed")
        return member

    def tensor(self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Any:
        """A StoredTensor; Inert when the tensor is not contiguous (no weight DeepSpeed saves is)."""
        if not all(type(size) is int and size >= 0 for size in (offset, *shape)):
            raise pickle.UnpicklingError(f"a tensor has offset {offset!r} and shape {shape!r}")
        if stride != _contiguous_stride(shape) and math.prod(shape) > 1:
            return Inert()
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
    """An unpickler makes as much room for remembered values as the largest index that the file names."""
    for instruction, argument, _ in pickletools.genops(instructions):
        if instruction.name in ("PUT", "LONG_BINPUT") and not 0 <= (argument or 0) < len(instructions):
            raise pickle.UnpicklingError(f"its memo is to hold {argument} values, more than its pickle has bytes")


def read_archive(path: Path) -> Any:
    """The object that was saved, with StoredTensors for tensors and Inert for anything that is not plain data.

    Raises:
        UserError: the file is missing, truncated or no `torch.save` zip.
    """
    try:
        with zipfile.ZipFile(path) as members:
            return _Unpickler(_Archive(path, members)).load()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "the checkpoint is not complete: use another one") from None
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
        hint = "the file was cut short or altered: use another checkpoint"
        raise UserError(f"{path} is not a readable torch checkpoint: {error}", hint) from None
