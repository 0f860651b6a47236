"""Encodes one chunk into its folder: train/validation split, skipped rows, record.json; publishes it by one rename.

The folder is filled under a temporary name and renamed when it is complete. If another process has written the same
chunk first, this process discards its own folder. A worker holds one batch of documents and its ids in memory, for any
size of the chunk.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Split, TokenizerManifest
from longhaul.artifacts.atomic_files import write_json
from longhaul.artifacts.leases import process_start
from longhaul.artifacts.shared_file_system import exists_on_server
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.config.dataset_config import Dataset
from longhaul.data.readers.read_documents import Document, no_documents, read_range
from longhaul.data.readers.rows_and_file_ranges import BadData
from longhaul.data.shards.chunks import Chunk, SourceFile, SourceRange
from longhaul.data.shards.indexed_dataset import token_dtype
from longhaul.data.shards.progress_line import ProgressCounters
from longhaul.data.shards.shard_writer import SplitWriter
from longhaul.data.tokenizers.document_encoder import (
    NOTHING_TO_TRAIN_ON,
    DocumentEncoder,
    EncodedBatch,
    group_into_batches,
)
from longhaul.data.tokenizers.message_keys import MessageKeyCount
from longhaul.data.tokenizers.token_rows import select_documents
from longhaul.errors import UserError

RECORD = "record.json"
_KEYS = "keys.bin"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class EncodingTask:
    """The settings that all chunks of a dataset share.

    threshold: documents with lower keys are in the validation split.
    """

    root: Path
    dataset: Dataset
    sources: Mapping[int, SourceFile]
    tokenizer: TokenizerManifest
    encoder: str
    threshold: int

    def for_chunk(self, chunk: Chunk) -> EncodingTask:
        """Return the task with the sources of one chunk only, so that sending it to a worker is cheap."""
        return replace(self, sources={part.source: self.sources[part.source] for part in chunk.ranges})


class ChunkWriter:
    """Encodes chunks, one after another, in one process."""

    def __init__(self, task: EncodingTask, counters: ProgressCounters) -> None:
        self._task, self._counters = task, counters
        self._encoder = DocumentEncoder(task.tokenizer, task.dataset, task.encoder)

    def write(self, chunk: Chunk) -> None:
        """Write the chunk's folder unless it exists.

        Raises:
            UserError: the data is bad.
            EncodersDisagree: the fast encoder gave other ids than the reference.
            OSError: the file system refused a write.
        """
        folder = self._task.root / chunk.name
        if (folder / RECORD).is_file():
            return
        with publish_folder(self._task.root, folder, RECORD) as temporary:
            write_json(temporary / RECORD, self._fill(chunk, temporary))

    def _fill(self, chunk: Chunk, folder: Path) -> ChunkRecord:
        dtype, is_chat = token_dtype(self._task.tokenizer.vocab_size), self._task.dataset.kind == "chat"
        writers = {split: SplitWriter(folder, split, dtype, is_chat) for split in SPLITS}
        contents = _ChunkContents()
        for source_range in chunk.ranges:
            self._encode_range(source_range, writers, contents)
        self._encoder.check()
        contents.message_keys = self._encoder.take_unread_keys()
        contents.write_keys(folder)
        return contents.record({split: writer.close() for split, writer in writers.items()})

    def _encode_range(
        self, source_range: SourceRange, writers: dict[str, SplitWriter], contents: _ChunkContents
    ) -> None:
        skipped_before = contents.skipped.total()
        for documents in group_into_batches(self._read_documents(source_range, contents)):
            encoded = self._encoder.encode(documents)
            contents.control_texts += encoded.control_texts
            for error in encoded.left_out:
                self._leave_out(error, contents)
            self._add(encoded, writers, contents)
            self._count(source_range, documents[-1].position, len(encoded.keys), len(encoded.tokens), contents)
        self._count(source_range, None, 0, 0, contents)
        source = self._task.sources[source_range.source]
        source.require_unchanged()
        has_no_rows = not contents.documents[-1] and contents.skipped.total() == skipped_before
        if source_range.stop is None and has_no_rows:
            self._leave_out(no_documents(source.path), contents)

    def _read_documents(self, source_range: SourceRange, contents: _ChunkContents) -> Iterator[Document]:
        contents.documents.append(0)
        for document in read_range(source_range.file_range(self._task.sources), self._task.dataset):
            if isinstance(document, BadData):
                # The error may come from a change of the file: that is reported first.
                self._task.sources[source_range.source].require_unchanged()
                self._leave_out(document, contents)
            else:
                contents.documents[-1] += 1
                contents.unread_columns.update(document.unread)
                yield document

    def _leave_out(self, error: BadData, contents: _ChunkContents) -> None:
        """Apply the dataset's `bad_rows` policy to an error; the first error of each kind in a chunk is printed."""
        if error.reason not in NOTHING_TO_TRAIN_ON:
            if self._task.dataset.bad_rows == "stop":
                raise error.stopping()
            if error.reason not in contents.skipped:
                rest = "; the rest of the file is not read" if error.ends_file else ""
                print(f"left out ({error.reason}): {error.message}{rest}", file=sys.stderr, flush=True)
        contents.skipped[error.reason] += 1

    def _add(self, encoded: EncodedBatch, writers: dict[str, SplitWriter], contents: _ChunkContents) -> None:
        if not len(encoded.keys):
            return
        contents.keys.append(encoded.keys)
        contents.lowest_key = min(contents.lowest_key, int(encoded.keys.min()))
        contents.highest_key = max(contents.highest_key, int(encoded.keys.max()))
        is_validation = encoded.keys < np.uint64(self._task.threshold)
        for split, selected in (("train", ~is_validation), ("validation", is_validation)):
            if not selected.any():
                continue
            tokens = select_documents(encoded.tokens, encoded.lengths, selected)
            mask = None if encoded.mask is None else select_documents(encoded.mask, encoded.lengths, selected)
            writers[split].add(tokens, encoded.lengths[selected], mask)

    def _count(
        self, source_range: SourceRange, position: int | None, documents: int, tokens: int, contents: _ChunkContents
    ) -> None:
        """Add to the progress counters; position is None at the end of the range.

        Positions are bytes of the file. The start and stop of a range of row groups are not bytes, so its progress is
        limited to the range's size.
        """
        covers_bytes = source_range.size_bytes == (source_range.stop or 0) - source_range.start
        first = source_range.start if covers_bytes else 0
        size = source_range.size_bytes
        done = size if position is None else max(0, min(position - first, size))
        self._counters.add(max(0, done - contents.counted_bytes), documents, tokens)
        contents.counted_bytes = 0 if position is None else max(done, contents.counted_bytes)


@dataclass
class _ChunkContents:
    """The contents of a chunk, collected while it is encoded.

    documents:     documents of each range.
    skipped:       number of documents left out, by reason.
    keys:          keys of the documents in the shards, [D] uint64 in all.
    counted_bytes: bytes of the current range that the progress counters include.
    unread_columns: number of rows, by the name of a column that nothing reads.
    message_keys:  keys of messages that only a chat template can read (message_keys.UnreadKeys).
    control_texts: conversations in which a message contains the text of a control token.
    """

    documents: list[int] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    keys: list[np.ndarray] = field(default_factory=list)
    lowest_key: int = 2**64
    highest_key: int = -1
    counted_bytes: int = 0
    unread_columns: Counter[str] = field(default_factory=Counter)
    message_keys: dict[str, MessageKeyCount] = field(default_factory=dict)
    control_texts: int = 0

    def write_keys(self, folder: Path) -> None:
        """Write the keys in the order of the sources; the keys of either split are in the order of its shards."""
        with (folder / _KEYS).open("wb") as stream:
            np.concatenate([np.empty(0, np.uint64), *self.keys]).astype("<u8").tofile(stream)
            os.fsync(stream.fileno())

    def record(self, splits: dict[str, Split]) -> ChunkRecord:
        """Return the content of the chunk's record.json."""
        return {
            "splits": splits,
            "documents": self.documents,
            "skipped": dict(sorted(self.skipped.items())),
            "unread_columns": dict(sorted(self.unread_columns.items())),
            "message_keys": self.message_keys,
            "control_texts": self.control_texts,
            "lowest_key": self.lowest_key,
            "highest_key": self.highest_key,
        }


class ChunkRecord(TypedDict):
    """record.json of a finished chunk. documents: of each range of its sources; the keys are those of its documents."""

    splits: dict[str, Split]
    documents: list[int]
    skipped: dict[str, int]
    unread_columns: dict[str, int]
    message_keys: dict[str, MessageKeyCount]
    control_texts: int
    lowest_key: int
    highest_key: int


def read_chunk_record(folder: Path) -> ChunkRecord:
    """Read the record.json of a finished chunk."""
    return read_typed_json(folder / RECORD, ChunkRecord, f"delete the folder {folder} and run again")


def read_document_keys(folder: Path) -> np.ndarray:
    """Return [D] uint64: the document keys of a finished chunk, in the order of its sources."""
    return np.fromfile(folder / _KEYS, "<u8")


@contextmanager
def publish_folder(root: Path, folder: Path, last_file: str) -> Iterator[Path]:
    """Yield a temporary folder to fill; rename it to `folder` when the block ends without an exception.

    If another process has written `folder` first, with its file `last_file`, the temporary folder is deleted.
    """
    prefix = f".{folder.name}-{socket.gethostname()}-{os.getpid()}-{process_start(os.getpid())}-"
    with tempfile.TemporaryDirectory(dir=root, prefix=prefix) as outer:
        temporary = Path(outer) / "chunk"
        temporary.mkdir()
        yield temporary
        try:
            temporary.rename(folder)
        except OSError as error:
            if exists_on_server(folder / last_file):
                return
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            message = f"{folder} exists without {last_file}: longhaul did not write it"
            raise UserError(message, "move or delete it, then run again") from None


def remove_leftovers(root: Path) -> None:
    """Delete the temporary folders of processes of this host that have ended."""
    for leftover in root.glob(".*-*-*-*-*"):
        _, *host, pid, started, _ = leftover.name.split("-")
        if "-".join(host) == socket.gethostname() and pid.isdigit() and process_start(int(pid)) != started:
            shutil.rmtree(leftover, ignore_errors=True)
