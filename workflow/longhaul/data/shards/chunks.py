"""Divides source files into chunks (chunk_mb, groups of small files), names each by a hash, and spreads them over data_jobs.

A chunk is what one worker encodes at once; a chunk's shards are kept or written again as a whole.
Large files in a format that can be read from the middle are divided by size. Small files are grouped. Where a group of
small files ends depends only on the content and the size of each file, so that a new file changes only its own group.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from longhaul.artifacts.atomic_files import content_hash, file_sha256
from longhaul.data.readers.rows_and_file_ranges import FileRange
from longhaul.data.readers.select_reader import format_of
from longhaul.errors import UserError

_MAX_CHUNKS_PER_GROUP = 4  # a group of small files ends at this multiple of the chunk size


@dataclass(frozen=True)
class SourceFile:
    """A source file as it was when it was hashed. Size and modification time show whether it has changed since."""

    path: str
    file_format: str
    size_bytes: int
    sha256: str
    modified_ns: int

    @classmethod
    def from_file(cls, file: str, file_format: str) -> SourceFile:
        """Hash a file; UserError when it cannot be read or changes while it is read."""
        path = Path(file)
        try:
            before = path.stat()
            digest = file_sha256(path)
        except OSError as error:
            raise UserError(
                f"cannot read {file}: {error.strerror}", "make it readable, or correct the dataset's `files`"
            ) from None
        known_format = format_of(path) if file_format == "auto" else file_format
        source = cls(file, known_format, before.st_size, digest, before.st_mtime_ns)
        source.require_unchanged()
        return source

    def refreshed(self) -> SourceFile:
        """Return the file as it is now, for a later job; UserError when its content has changed.

        The file is hashed again only where its size or modification time differs.
        """
        with suppress(OSError, UserError):
            self.require_unchanged()
            return self
        now = SourceFile.from_file(self.path, self.file_format)
        if now.sha256 != self.sha256:
            raise UserError(
                f"{self.path} changed after the dataset's sources were indexed",
                "run again: the sources are then indexed again",
            )
        return now

    def require_unchanged(self) -> None:
        """Raise UserError when the file is not the one that was hashed."""
        try:
            now = Path(self.path).stat()
        except FileNotFoundError:
            raise UserError(f"{self.path} was removed while it was read", "restore it, then run again") from None
        if (now.st_size, now.st_mtime_ns) != (self.size_bytes, self.modified_ns):
            raise UserError(
                f"{self.path} changed while it was read ({self.size_bytes} bytes before, {now.st_size} now)",
                "wait until the program that writes it has finished, then run again",
            )


@dataclass(frozen=True)
class SourceRange:
    """A part of one source.

    source:      number of the source in the dataset.
    start, stop: as in readers.rows.FileRange.
    size_bytes:  bytes of the file that this range covers.
    """

    source: int
    start: int
    stop: int | None
    size_bytes: int

    def file_range(self, sources: Sequence[SourceFile] | Mapping[int, SourceFile]) -> FileRange:
        """Return the range with the path and the format of its source."""
        source = sources[self.source]
        return FileRange(Path(source.path), source.file_format, self.start, self.stop)


@dataclass(frozen=True)
class Chunk:
    """Consecutive ranges of the sources, and the name of the chunk's folder: a hash of content and settings."""

    name: str
    ranges: tuple[SourceRange, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of source files in the chunk."""
        return sum(source_range.size_bytes for source_range in self.ranges)


def divide_into_chunks(sources: Sequence[SourceFile], chunk_bytes: int, settings: dict[str, object]) -> list[Chunk]:
    """Return all chunks of a dataset, in the order of its sources; the settings are part of each chunk's name."""
    groups = _group_ranges(sources, chunk_bytes)
    return [Chunk(_chunk_name(group, sources, settings), tuple(group)) for group in groups]


def chunks_of_partition(chunks: Sequence[Chunk], partition: int, partitions: int) -> list[Chunk]:
    """Return the chunks of data partition 1 … `partitions`, the largest first; partitions have about equal bytes."""
    return sorted(chunks, key=lambda chunk: (-chunk.size_bytes, chunk.name))[partition - 1 :: partitions]


def _chunk_name(group: list[SourceRange], sources: Sequence[SourceFile], settings: dict[str, object]) -> str:
    contents = [[sources[part.source].sha256, part.start, part.stop] for part in group]
    return content_hash([settings, contents])


def _group_ranges(sources: Sequence[SourceFile], chunk_bytes: int) -> Iterator[list[SourceRange]]:
    group: list[SourceRange] = []
    for number, source in enumerate(sources):
        ranges = list(_divide_file(number, source, chunk_bytes))
        if group and (len(ranges) > 1 or source.size_bytes >= chunk_bytes):
            yield group
            group = []
        if len(ranges) > 1:
            yield from ([source_range] for source_range in ranges)
            continue
        group += ranges
        # A file ends its group with probability size / chunk_bytes, so that the mean size of a group is chunk_bytes.
        random_fraction = int(source.sha256[:12], 16) / 16**12
        group_bytes = sum(part.size_bytes for part in group)
        if random_fraction * chunk_bytes < source.size_bytes or group_bytes >= _MAX_CHUNKS_PER_GROUP * chunk_bytes:
            yield group
            group = []
    if group:
        yield group


def _divide_file(number: int, source: SourceFile, chunk_bytes: int) -> Iterator[SourceRange]:
    count = -(-source.size_bytes // chunk_bytes)
    if count > 1 and source.file_format == "parquet":
        yield from _divide_row_groups(number, source, chunk_bytes)
    elif count > 1 and source.file_format == "jsonl" and not source.path.endswith((".gz", ".zst")):
        edges = [source.size_bytes * index // count for index in range(count + 1)]
        for start, stop in itertools.pairwise(edges):
            yield SourceRange(number, start, stop, stop - start)
    else:
        yield SourceRange(number, 0, None, source.size_bytes)


def _divide_row_groups(number: int, source: SourceFile, chunk_bytes: int) -> Iterator[SourceRange]:
    """Yield ranges of row groups with about `chunk_bytes` bytes each."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(source.path)
    except (OSError, pyarrow.ArrowException):
        yield SourceRange(number, 0, None, source.size_bytes)  # the reader reports the error
        return
    sizes = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
    scale = source.size_bytes / max(1, sum(sizes))
    start = range_bytes = 0
    for index, size in enumerate(sizes):
        range_bytes += size
        if range_bytes * scale >= chunk_bytes or index == len(sizes) - 1:
            yield SourceRange(number, start, index + 1, int(range_bytes * scale))
            start, range_bytes = index + 1, 0
