"""Reads what torch's flight recorder wrote of each rank: the last collectives, and the ranks of each process group.

The files are pickles. Only opcodes of plain data are allowed, so a file can name no class or function.
Format 2.10: torch/csrc/distributed/c10d/FlightRecorderDetail.hpp of torch 2.13.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from longhaul.artifacts.atomic_files import read_bytes
from longhaul.errors import UserError, first_line

_MAX_BYTES = 256 * 2**20
"""2,000 collectives with the stack of each take about half a megabyte."""
_PLAIN_DATA = frozenset(
    (
        "PROTO",
        "STOP",
        "MARK",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "EMPTY_DICT",
        "EMPTY_LIST",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "APPEND",
        "APPENDS",
        "SETITEM",
        "SETITEMS",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
    )
)
"""Opcodes that build dictionaries, lists, tuples, numbers, strings and None."""


class RecordedCollective(TypedDict):
    """One recorded collective or point-to-point operation; other fields of the file are left out.

    process_group:     name and description of its process group
    collective_seq_id: number among the collectives of its group, counted from 1; point-to-point operations do not count
    profiling_name:    backend and operation: nccl:all_reduce
    state:             scheduled, started or completed. Under gloo it stays scheduled
    """

    process_group: tuple[str, str]
    collective_seq_id: int
    profiling_name: str
    time_created_ns: int
    input_sizes: list[list[int]]
    state: str
    is_p2p: bool


class _GroupRanks(TypedDict):
    ranks: str


class _Dump(TypedDict):
    entries: list[RecordedCollective]
    pg_config: dict[str, _GroupRanks]


@dataclass(frozen=True)
class RankRecord:
    """Record of one rank.

    collectives: the oldest first
    groups:      name of a process group -> its ranks, where the file states them
    """

    collectives: list[RecordedCollective]
    groups: dict[str, list[int]]


def read_rank_record(path: Path) -> RankRecord:
    """Read the file of one rank.

    Raises:
        UserError: the file is missing, too large, truncated, or not of the flight recorder.
    """
    if path.exists() and path.stat().st_size > _MAX_BYTES:
        raise _unreadable(path, f"it has more than {_MAX_BYTES} bytes")
    data = read_bytes(path)
    try:
        _refuse_all_but_plain_data(data)
        dump = _adapter().validate_python(_RecordUnpickler(io.BytesIO(data)).load())
        groups = {name: json.loads(group["ranks"]) for name, group in dump["pg_config"].items()}
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        raise _unreadable(path, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except (pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        raise _unreadable(path, first_line(error)) from None
    return RankRecord(dump["entries"], groups)


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")


def _refuse_all_but_plain_data(data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _PLAIN_DATA:
            raise pickle.UnpicklingError(f"it holds the opcode {opcode.name}")
        # The unpickler allocates its memo up to the largest index.
        if opcode.name == "LONG_BINPUT" and not 0 <= (argument or 0) < len(data):
            raise pickle.UnpicklingError(f"its memo index {argument} exceeds its {len(data)} bytes")


@cache
def _adapter() -> TypeAdapter[_Dump]:
    return TypeAdapter(_Dump)


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is no readable record of torch's flight recorder: {reason}",
        "delete it: the other ranks' records may say enough",
    )
