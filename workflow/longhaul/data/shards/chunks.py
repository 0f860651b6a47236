"""Source files -> work units: what one worker encodes in one go, and what is kept or made anew as a whole.

Large files that can be entered anywhere are cut by size; small ones are taken together. Where a group of small files ends
depends on each file's own content and size alone, so a new file remakes the group it falls into and no other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longhaul.artifacts.files import content_hash, file_sha256
from longhaul.data.readers.formats import format_of
from longhaul.data.readers.rows import Part
from longhaul.errors import UserError

_MOST_UNITS_IN_ONE = 4  # a group of small files is closed at this many times the size of a unit


@dataclass(frozen=True)
class Source:
    """A file as it was when it was hashed; size and time of change tell whether it still is."""

    path: str
    file_format: str
    bytes: int
    sha256: str
    modified_ns: int

    @classmethod
    def of(cls, file: str, chosen_format: str) -> Source:
        """Reads and hashes a file; UserError when it cannot be read or grows meanwhile."""
        path = Path(file)
        try:
            before = path.stat()
            digest = file_sha256(path)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}", "check the dataset's `files`") from None
        found = format_of(path) if chosen_format == "auto" else chosen_format
        source = cls(file, found, before.st_size, digest, before.st_mtime_ns)
        source.check_unchanged()
        return source

    def again(self) -> Source:
        """The file in a later job: hashed once more only if it was touched since. UserError when it is another one."""
        with suppress(OSError, UserError):
            self.check_unchanged()
            return self
        now = Source.of(self.path, self.file_format)
        if now.sha256 != self.sha256:
            raise UserError(f"{self.path} changed since the dataset was surveyed", "run again: it is surveyed anew")
        return now

    def check_unchanged(self) -> None:
        """UserError when the file is not the one that was hashed."""
        try:
            now = Path(self.path).stat()
        except FileNotFoundError:
            raise UserError(f"{self.path} was removed while it was read", "put it back, then run again") from None
        if (now.st_size, now.st_mtime_ns) != (self.bytes, self.modified_ns):
            raise UserError(
                f"{self.path} changed while it was read ({self.bytes} bytes before, {now.st_size} now)",
                "let whatever writes it finish, then run again",
            )


@dataclass(frozen=True)
class Piece:
    """Part of source number `file` of the dataset; start and stop as in formats.Part; bytes: its share of the file."""

    file: int
    start: int
    stop: int | None
    bytes: int

    def part(self, sources: Sequence[Source] | Mapping[int, Source]) -> Part:
        source = sources[self.file]
        return Part(Path(source.path), source.file_format, self.start, self.stop)


@dataclass(frozen=True)
class Unit:
    """Consecutive pieces and the name of their folder: a hash of what is in them and of the settings."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)


def cut(sources: Sequence[Source], unit_bytes: int, settings: dict[str, Any]) -> list[Unit]:
    """All units of a dataset, in the order of its files."""
    groups = _groups(sources, unit_bytes)
    return [Unit(_name(group, sources, settings), tuple(group)) for group in groups]


def share_of(units: Sequence[Unit], share: int, shares: int) -> list[Unit]:
    """Share 1 … shares of the units, about as many bytes in each; the largest first."""
    return sorted(units, key=lambda unit: (-unit.bytes, unit.name))[share - 1 :: shares]


def _name(group: list[Piece], sources: Sequence[Source], settings: dict[str, Any]) -> str:
    contents = [[sources[piece.file].sha256, piece.start, piece.stop] for piece in group]
    return content_hash([settings, contents])


def _groups(sources: Sequence[Source], unit_bytes: int) -> Iterator[list[Piece]]:
    held: list[Piece] = []
    for number, source in enumerate(sources):
        pieces = list(_pieces(number, source, unit_bytes))
        if held and (len(pieces) > 1 or source.bytes >= unit_bytes):
            yield held
            held = []
        if len(pieces) > 1:
            yield from ([piece] for piece in pieces)
            continue
        held += pieces
        # A file ends its group with the chance size / unit, so that groups have the size of a unit on average.
        drawn = int(source.sha256[:12], 16) / 16**12
        if drawn * unit_bytes < source.bytes or sum(p.bytes for p in held) >= _MOST_UNITS_IN_ONE * unit_bytes:
            yield held
            held = []
    if held:
        yield held


def _pieces(number: int, source: Source, unit_bytes: int) -> Iterator[Piece]:
    count = -(-source.bytes // unit_bytes)
    if count > 1 and source.file_format == "parquet":
        yield from _row_groups(number, source, unit_bytes)
    elif count > 1 and source.file_format == "jsonl" and not source.path.endswith((".gz", ".zst")):
        edges = [source.bytes * index // count for index in range(count + 1)]
        for start, stop in itertools.pairwise(edges):
            yield Piece(number, start, stop, stop - start)
    else:
        yield Piece(number, 0, None, source.bytes)


def _row_groups(number: int, source: Source, unit_bytes: int) -> Iterator[Piece]:
    """Row groups are taken together until they hold a unit's bytes."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(source.path)
    except (OSError, pyarrow.ArrowException):
        yield Piece(number, 0, None, source.bytes)  # whoever reads it says what is wrong
        return
    sizes = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
    scale = source.bytes / max(1, sum(sizes))
    start = held = 0
    for index, size in enumerate(sizes):
        held += size
        if held * scale >= unit_bytes or index == len(sizes) - 1:
            yield Piece(number, start, index + 1, int(held * scale))
            start, held = index + 1, 0
