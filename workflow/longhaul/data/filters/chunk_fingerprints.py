"""Computes and stores what the filters need of each chunk's documents: keys, MinHash bands, matches with evaluation texts.

The bands find near duplicates. A chunk is fingerprinted after it is encoded, into <root>/<name>.fingerprints/: keys.npy
[D] uint64 (document_encoder.document_key), bands.npy [D, 14] uint64 and evaluation_matches.json, as far as the
dataset's settings need them. Like the chunk, the folder is renamed when it is complete.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longhaul.artifacts.atomic_files import content_hash, file_sha256, write_json
from longhaul.config.dataset_config import Dataset, Decontaminate
from longhaul.data.filters.evaluation_texts import EvaluationTexts, read_evaluation_texts
from longhaul.data.filters.near_duplicates import BANDS, minhash_bands, minhash_settings
from longhaul.data.filters.word_ngrams import WORD_RULES, split_words
from longhaul.data.readers.read_documents import Document, document_texts, read_range
from longhaul.data.shards.chunks import Chunk
from longhaul.data.shards.write_chunk import EncodingTask, publish_folder
from longhaul.data.tokenizers.document_encoder import document_key, group_into_batches

KEYS_FILE, BANDS_FILE, MATCHES_FILE = "keys.npy", "bands.npy", "evaluation_matches.json"


class EvaluationMatch(NamedTuple):
    """A document, given by its key, that contains an n-gram of an evaluation text; with both locations, for people."""

    key: int
    document: str
    evaluation: str
    words: str


class TextFilters(NamedTuple):
    """The filters of a dataset that need the documents' texts.

    near_duplicates:   True to filter out near duplicates.
    decontaminate:     the config's settings; None to ignore evaluation texts.
    evaluation_files:  the files with evaluation texts, in order.
    evaluation_sha256: the files' hashes.
    """

    near_duplicates: bool
    decontaminate: Decontaminate | None
    evaluation_files: tuple[str, ...]
    evaluation_sha256: tuple[str, ...]

    @classmethod
    def load(cls, dataset: Dataset, evaluation_files: tuple[str, ...]) -> TextFilters:
        """Return a dataset's filters, and read the evaluation texts into this process's cache for forked workers.

        Raises:
            UserError: evaluation texts cannot be read.
        """
        hashes = tuple(file_sha256(Path(file)) for file in evaluation_files)
        filters = cls(dataset.deduplicate == "near", dataset.decontaminate, evaluation_files, hashes)
        if dataset.decontaminate:
            found = filters.evaluation_texts(dataset.decontaminate)
            print(
                f"decontaminate: {len(found.texts):,} evaluation texts; {found.short_texts:,} of them are shorter than "
                f"{found.ngram_words} words and cannot be found",
                file=sys.stderr,
                flush=True,
            )
        return filters

    def evaluation_texts(self, settings: Decontaminate) -> EvaluationTexts:
        """Return the index of the evaluation texts."""
        return read_evaluation_texts(
            self.evaluation_files, self.evaluation_sha256, settings.columns, settings.ngram_words
        )

    @property
    def need_texts(self) -> bool:
        """True if the texts have to be read again after they are encoded."""
        return self.near_duplicates or self.decontaminate is not None

    @property
    def settings(self) -> list[object]:
        """Everything that decides the fingerprints of a text."""
        found: list[object] = [*WORD_RULES, *(minhash_settings() if self.near_duplicates else [])]
        if self.decontaminate:
            found += [self.decontaminate.ngram_words, self.decontaminate.columns, self.evaluation_sha256]
        return found

    def folder(self, chunk: Chunk, task: EncodingTask) -> Path:
        """Return the folder of a chunk's fingerprints."""
        # Matches contain the paths of source files, so the paths are part of the name.
        paths = [task.sources[part.source].path for part in chunk.ranges] if self.decontaminate else []
        return task.root / f"{content_hash([chunk.name, self.settings, paths])}.fingerprints"


def fingerprint_chunk(task: EncodingTask, chunk: Chunk, filters: TextFilters) -> None:
    """Write the folder of a chunk's fingerprints unless it exists.

    Rows that cannot be read are ignored: encoding the chunk has reported them.
    """
    folder = filters.folder(chunk, task)
    if (folder / KEYS_FILE).is_file():
        return
    keys: list[int] = []
    bands: list[np.ndarray] = []
    matches: list[EvaluationMatch] = []
    for documents in group_into_batches(_read_chunk(task, chunk)):
        keys += map(document_key, documents)
        words = [[word for text in document_texts(document) for word in split_words(text)] for document in documents]
        if filters.near_duplicates:
            pairs = zip(words, documents, strict=True)
            bands.append(minhash_bands([of_one or [str(document.content)] for of_one, document in pairs]))
        if filters.decontaminate:
            matches += _find_matches(documents, words, filters.evaluation_texts(filters.decontaminate))
    with publish_folder(task.root, folder, KEYS_FILE) as temporary:
        _save(temporary / KEYS_FILE, np.array(keys, np.uint64))
        if filters.near_duplicates:
            _save(temporary / BANDS_FILE, np.concatenate([np.empty((0, BANDS), np.uint64), *bands]))
        if filters.decontaminate:
            write_json(temporary / MATCHES_FILE, matches)


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as stream:
        np.save(stream, array)
        stream.flush()
        os.fsync(stream.fileno())


def _read_chunk(task: EncodingTask, chunk: Chunk) -> Iterator[Document]:
    for source_range in chunk.ranges:
        found = read_range(source_range.file_range(task.sources), task.dataset)
        yield from (document for document in found if isinstance(document, Document))
        task.sources[source_range.source].require_unchanged()


def _find_matches(
    documents: Iterable[Document], words: Iterable[list[str]], evaluation: EvaluationTexts
) -> Iterator[EvaluationMatch]:
    for document, of_one in zip(documents, words, strict=True):
        if match := evaluation.find(of_one):
            ngram, location = match
            yield EvaluationMatch(document_key(document), str(document.where), location, ngram)
