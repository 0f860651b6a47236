"""What is looked up in a document's text to decide whether it stays: sketches for near duplicates, runs of evaluation texts.

A unit is scanned after it is encoded, into <root>/<name>/: keys.npy [D] uint64 (document_encoder.document_key),
bands.npy [D, 14] uint64 and hits.json, whichever are asked for. Like a unit's shards they are renamed into place whole.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longhaul.artifacts.files import content_hash, file_sha256, write_json
from longhaul.config.dataset_config import Dataset, Decontaminate
from longhaul.data.filters.word_ngrams import runs, words
from longhaul.data.readers.documents import Document, documents_of, texts
from longhaul.data.readers.formats import rows
from longhaul.data.readers.rows import BadData, Part
from longhaul.data.shards.chunks import Unit
from longhaul.data.shards.write_chunk import Task, published
from longhaul.data.tokenizers.document_encoder import batches, document_key
from longhaul.errors import UserError

KEYS, BANDS, HITS = "keys.npy", "bands.npy", "hits.json"
# As FineWeb (Penedo et al., 2024): two documents whose 5-word runs overlap by s (Jaccard) share a band with chance
# 1 - (1 - s^8)^14: 0.92 at 0.8, 0.05 at 0.5.
_SHINGLE_WORDS, _BANDS, _ROWS, _SEED = 5, 14, 8, 1
_MAX_EVALUATION_ROW_BYTES = 200_000_000


class Hit(NamedTuple):
    """A document that holds a run of words of an evaluation text, by key; the places of both, for people."""

    key: int
    document: str
    evaluation: str
    words: str


class Scan(NamedTuple):
    """What a dataset's units are scanned for."""

    near: bool
    decontaminate: Decontaminate | None
    evaluation: tuple[str, ...]  # files, in order
    evaluation_sha256: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Dataset, evaluation: tuple[str, ...]) -> Scan:
        """UserError for evaluation texts that cannot be read; they are read here, so that forked workers share them."""
        hashes = tuple(file_sha256(Path(file)) for file in evaluation)
        if dataset.decontaminate:
            found = read_evaluation(
                evaluation, hashes, dataset.decontaminate.columns, dataset.decontaminate.ngram_words
            )
            print(
                f"decontaminate: {len(found.texts):,} evaluation texts, {found.short:,} of them shorter than "
                f"{found.length} words, which cannot be found",
                file=sys.stderr,
                flush=True,
            )
        return cls(dataset.deduplicate == "near", dataset.decontaminate, evaluation, hashes)

    @property
    def is_needed(self) -> bool:
        """Whether texts have to be read again."""
        return self.near or self.decontaminate is not None

    @property
    def settings(self) -> list[Any]:
        """All that decides what is found in a text."""
        found: list[Any] = []
        if self.near:
            import rensa

            version = rensa.RMinHash.ALGORITHM_VERSION  # pyright: ignore[reportAttributeAccessIssue]
            found += [version, _SHINGLE_WORDS, _BANDS, _ROWS, _SEED]
        if self.decontaminate:
            found += [self.decontaminate.ngram_words, self.decontaminate.columns, self.evaluation_sha256]
        return found

    def name(self, unit: Unit, task: Task) -> str:
        """Of the scan of one unit. Places of hits name files, so their paths are in it."""
        paths = [task.sources[piece.file].path for piece in unit.pieces] if self.decontaminate else []
        return f"{content_hash([unit.name, self.settings, paths])}.scan"


def scan_unit(task: Task, unit: Unit, scan: Scan) -> None:
    """Makes the scan's folder unless it is there; what cannot be read was dealt with when the unit was encoded."""
    folder = task.root / scan.name(unit, task)
    if (folder / KEYS).is_file():
        return
    keys: list[int] = []
    bands: list[np.ndarray] = []
    hits: list[Hit] = []
    for documents in batches(_documents(task, unit)):
        keys += map(document_key, documents)
        rows_of_words = [[word for text in texts(document) for word in words(text)] for document in documents]
        if scan.near:
            pairs = zip(rows_of_words, documents, strict=True)
            bands.append(band_hashes([row or [str(document.content)] for row, document in pairs]))
        if scan.decontaminate:
            hits += _hits(documents, rows_of_words, scan)
    with published(task.root, folder, KEYS) as made:
        _save(made / KEYS, np.array(keys, np.uint64))
        if scan.near:
            _save(made / BANDS, np.concatenate([np.empty((0, _BANDS), np.uint64), *bands]))
        if scan.decontaminate:
            write_json(made / HITS, hits)


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as stream:
        np.save(stream, array)
        stream.flush()
        os.fsync(stream.fileno())


def _documents(task: Task, unit: Unit) -> Iterator[Document]:
    for piece in unit.pieces:
        found = documents_of(piece.part(task.sources), task.dataset)
        yield from (document for document in found if isinstance(document, Document))
        task.sources[piece.file].check_unchanged()


def band_hashes(rows_of_words: list[list[str]]) -> np.ndarray:
    """[D, 14] uint64: MinHash signatures of the documents' 5-word runs, in bands of 8; one equal band makes a candidate."""
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

    signatures = np.empty((len(rows_of_words), _BANDS * _ROWS), "<u4")
    # One by one: its batches start threads, of which there is one a process here already.
    for row, signature in zip(rows_of_words, signatures, strict=True):
        sketch = RMinHash(_BANDS * _ROWS, _SEED)
        sketch.update([" ".join(run) for run in runs(row, _SHINGLE_WORDS)] or [" ".join(row)])
        signature[:] = sketch.digest()
    bands = signatures.reshape(-1, _ROWS)
    hashed = [hashlib.blake2b(band.tobytes(), digest_size=8).digest() for band in bands]
    return np.frombuffer(b"".join(hashed), "<u8").reshape(len(rows_of_words), _BANDS)


def _hits(documents: Iterable[Document], rows_of_words: Iterable[list[str]], scan: Scan) -> Iterator[Hit]:
    assert scan.decontaminate
    length = scan.decontaminate.ngram_words
    evaluation = read_evaluation(scan.evaluation, scan.evaluation_sha256, scan.decontaminate.columns, length)
    for document, row in zip(documents, rows_of_words, strict=True):
        # Hashes of this process are compared first; words decide.
        if evaluation.hashes.isdisjoint(map(hash, runs(row, length))):
            continue
        for run in runs(row, length):
            if place := evaluation.place(run):
                yield Hit(document_key(document), str(document.where), place, " ".join(run))
                break


class Evaluation(NamedTuple):
    """Runs of words of all evaluation texts: hash (of this process) -> number of the first text that has it."""

    hashes: Any  # keys of the dict below
    first: dict[int, int]
    places: list[str]
    texts: list[str]
    short: int  # texts of fewer words than a run, which cannot be found
    length: int

    def place(self, run: tuple[str, ...]) -> str:
        """Where the run stands; "" if nowhere."""
        number = self.first.get(hash(run))
        if number is None or run not in set(runs(words(self.texts[number]), self.length)):
            return ""
        return self.places[number]


@lru_cache(maxsize=1)
def read_evaluation(
    files: tuple[str, ...], sha256: tuple[str, ...], columns: tuple[str, ...], length: int
) -> Evaluation:
    """All evaluation texts, some 150 bytes a word; files of other hashes are read anew. UserError for what is wrong."""
    first: dict[int, int] = {}
    places: list[str] = []
    kept: list[str] = []
    short = 0
    for file in files:
        for row in rows(Part(Path(file), "auto"), columns, _MAX_EVALUATION_ROW_BYTES):
            if isinstance(row.values, BadData):
                raise row.values
            for column, value in zip(columns, row.values, strict=True):
                if not isinstance(value, str):
                    found = type(value).__name__
                    raise UserError(f"{row.where}: {column} is {found}, not a string", "name a text column")
                row_of_words = words(value)
                short += len(row_of_words) < length
                for run in runs(row_of_words, length):
                    first.setdefault(hash(run), len(kept))
                places.append(str(row.where))
                kept.append(value)
    return Evaluation(first.keys(), first, places, kept, short, length)
