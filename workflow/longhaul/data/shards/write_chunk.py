"""One work unit -> its folder <root>/<unit>: shards of both splits and record.json, renamed into place when all is there.

Whoever comes second with the same unit finds the folder taken and throws its own away. A worker holds one batch of
documents and its ids in memory, whatever the size of the unit.
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
from typing import Any

import numpy as np

from longhaul.artifacts.files import read_json, write_json
from longhaul.artifacts.leases import process_start
from longhaul.artifacts.schemas import TokenizerManifest
from longhaul.artifacts.shared_file_system import appears
from longhaul.config.dataset_config import Dataset
from longhaul.data.readers.documents import Document, documents_of, no_documents
from longhaul.data.readers.rows import BadData
from longhaul.data.shards.chunks import Piece, Source, Unit
from longhaul.data.shards.indexed_dataset import SplitWriter, token_dtype
from longhaul.data.shards.progress import Counters
from longhaul.data.tokenizers.document_encoder import NOTHING_TO_TRAIN_ON, Encoded, Encoder, batches
from longhaul.errors import UserError

RECORD = "record.json"
_KEYS = "keys.bin"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Task:
    """What all units of a dataset share. Keys below `threshold` are held out."""

    root: Path
    dataset: Dataset
    sources: Mapping[int, Source]
    tokenizer: TokenizerManifest
    encoder: str
    threshold: int

    def of(self, unit: Unit) -> Task:
        """What one unit needs of it, small enough to be sent with it."""
        return replace(self, sources={piece.file: self.sources[piece.file] for piece in unit.pieces})


class Worker:
    """Makes units, one after another, in one process."""

    def __init__(self, task: Task, counters: Counters) -> None:
        self._task, self._counters = task, counters
        self._encoder = Encoder(task.tokenizer, task.dataset, task.encoder)

    def make(self, unit: Unit) -> None:
        """Makes the unit's folder unless it is there. UserError for bad data, EncodersDisagree, OSError for the disk."""
        folder = self._task.root / unit.name
        if (folder / RECORD).is_file():
            return
        with published(self._task.root, folder, RECORD) as made:
            write_json(made / RECORD, self._fill(unit, made))

    def _fill(self, unit: Unit, folder: Path) -> dict[str, Any]:
        dtype, is_chat = token_dtype(self._task.tokenizer.vocab_size), self._task.dataset.kind == "chat"
        writers = {split: SplitWriter(folder, split, dtype, is_chat) for split in SPLITS}
        found = _Found()
        for piece in unit.pieces:
            left_out = found.skipped.total()
            for documents in batches(self._documents(piece, found)):
                encoded = self._encoder.encode(documents)
                for error in encoded.left_out:
                    self._leave_out(error, found)
                self._add(encoded, writers, found)
                self._note(piece, documents[-1].position, len(encoded.keys), len(encoded.tokens), found)
            self._note(piece, None, 0, 0, found)
            source = self._task.sources[piece.file]
            source.check_unchanged()
            if piece.stop is None and not found.documents[-1] and found.skipped.total() == left_out:
                self._leave_out(no_documents(source.path), found)
        self._encoder.check()
        found.write_keys(folder)
        return found.record({split: writer.close() for split, writer in writers.items()})

    def _documents(self, piece: Piece, found: _Found) -> Iterator[Document]:
        found.documents.append(0)
        for document in documents_of(piece.part(self._task.sources), self._task.dataset):
            if isinstance(document, BadData):
                self._task.sources[piece.file].check_unchanged()  # what is cut short now may have been whole
                self._leave_out(document, found)
            else:
                found.documents[-1] += 1
                yield document

    def _leave_out(self, error: BadData, found: _Found) -> None:
        """By the dataset's policy; the first of each kind in a unit is named."""
        if error.reason not in NOTHING_TO_TRAIN_ON:
            if self._task.dataset.bad_rows == "stop":
                raise error
            if error.reason not in found.skipped:
                rest = "; nothing that follows in the file is read" if error.ends_file else ""
                print(f"left out ({error.reason}): {error.message}{rest}", file=sys.stderr, flush=True)
        found.skipped[error.reason] += 1

    def _add(self, encoded: Encoded, writers: dict[str, SplitWriter], found: _Found) -> None:
        if not len(encoded.keys):
            return
        found.keys.append(encoded.keys)
        found.lowest_key = min(found.lowest_key, int(encoded.keys.min()))
        found.highest_key = max(found.highest_key, int(encoded.keys.max()))
        is_validation = encoded.keys < np.uint64(self._task.threshold)
        for split, chosen in (("train", ~is_validation), ("validation", is_validation)):
            if not chosen.any():
                continue
            tokens = of_documents(encoded.tokens, encoded.lengths, chosen)
            mask = None if encoded.mask is None else of_documents(encoded.mask, encoded.lengths, chosen)
            writers[split].add(tokens, encoded.lengths[chosen], mask)

    def _note(self, piece: Piece, position: int | None, documents: int, tokens: int, found: _Found) -> None:
        """Progress within a piece: bytes count from its start, in the share of the file that the piece is."""
        first = piece.start if piece.bytes == (piece.stop or 0) - piece.start else 0
        done = piece.bytes if position is None else max(0, min(position - first, piece.bytes))
        self._counters.add(max(0, done - found.noted_bytes), documents, tokens)
        found.noted_bytes = 0 if position is None else max(done, found.noted_bytes)


def of_documents(values: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Of values [N] of documents with these lengths [D], those of the chosen [D] bool; neighbours are copied in one go."""
    if chosen.all():
        return values
    turns = np.flatnonzero(np.diff(np.r_[False, chosen, False]))
    places = np.r_[0, np.cumsum(lengths)][turns].reshape(-1, 2)
    return np.concatenate([values[:0], *(values[start:stop] for start, stop in places.tolist())])


@dataclass
class _Found:
    """What a unit's sources gave."""

    documents: list[int] = field(default_factory=list)  # of each piece
    skipped: Counter[str] = field(default_factory=Counter)
    keys: list[np.ndarray] = field(default_factory=list)  # of the documents in the shards, [D] uint64 in all
    lowest_key: int = 2**64
    highest_key: int = -1
    noted_bytes: int = 0

    def write_keys(self, folder: Path) -> None:
        """In the order of the sources; those of either split are in the order of its shards."""
        with (folder / _KEYS).open("wb") as stream:
            np.concatenate([np.empty(0, np.uint64), *self.keys]).astype("<u8").tofile(stream)
            os.fsync(stream.fileno())

    def record(self, splits: dict[str, Any]) -> dict[str, Any]:
        """The unit's record.json."""
        return {
            "splits": splits,
            "documents": self.documents,
            "skipped": dict(sorted(self.skipped.items())),
            "lowest_key": self.lowest_key,
            "highest_key": self.highest_key,
        }


def read_record(folder: Path) -> dict[str, Any]:
    """A finished unit's record.json."""
    return read_json(folder / RECORD)


def read_keys(folder: Path) -> np.ndarray:
    """[D] uint64: document keys of a finished unit, in the order of its sources."""
    return np.fromfile(folder / _KEYS, "<u8")


@contextmanager
def published(root: Path, folder: Path, last: str) -> Iterator[Path]:
    """A folder to fill, renamed to `folder` when the block ends well.

    Where another has been there first, with its file `last` in it, this one is thrown away.
    """
    prefix = f".{folder.name}-{socket.gethostname()}-{os.getpid()}-{process_start(os.getpid())}-"
    with tempfile.TemporaryDirectory(dir=root, prefix=prefix) as temporary:
        made = Path(temporary) / "unit"
        made.mkdir()
        yield made
        try:
            made.rename(folder)
        except OSError as error:
            if appears(folder / last):
                return
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            message = f"{folder} is in the way: it holds no {last}, so longhaul did not finish it"
            raise UserError(message, "move it away or delete it, then run again") from None


def remove_leftovers(root: Path) -> None:
    """Half-written units of processes of this host that are gone."""
    for leftover in root.glob(".*-*-*-*-*"):
        _, *host, pid, started, _ = leftover.name.split("-")
        if "-".join(host) == socket.gethostname() and pid.isdigit() and process_start(int(pid)) != started:
            shutil.rmtree(leftover, ignore_errors=True)
