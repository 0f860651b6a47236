"""Indexes the word n-grams (decontaminate.ngram_words) of evaluation texts, and finds documents that contain one."""

from __future__ import annotations

from collections.abc import KeysView
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from longhaul.data.filters.word_ngrams import ngrams, split_words
from longhaul.data.readers.rows_and_file_ranges import BadData, FileRange, WantedColumns
from longhaul.data.readers.select_reader import read_rows
from longhaul.errors import InputError

_MAX_ROW_BYTES = 200_000_000


class EvaluationTexts(NamedTuple):
    """An index of the n-grams of all evaluation texts.

    hashes:       hashes of all n-grams. They are valid in this process and processes forked from it.
    first_text:   hash of an n-gram -> number of the first text that contains it.
    locations:    location of each text.
    texts:        the texts.
    short_texts:  number of texts with fewer words than an n-gram, which cannot be found.
    ngram_words:  words of an n-gram.
    """

    hashes: KeysView[int]
    first_text: dict[int, int]
    locations: list[str]
    texts: list[str]
    short_texts: int
    ngram_words: int

    def find(self, words: list[str]) -> tuple[str, str] | None:
        """Return the first n-gram of a document that an evaluation text contains, and that text's location."""
        # Hashes are compared first, which is fast. Equal words decide.
        if self.hashes.isdisjoint(map(hash, ngrams(words, self.ngram_words))):
            return None
        for ngram in ngrams(words, self.ngram_words):
            if location := self._location(ngram):
                return " ".join(ngram), location
        return None

    def _location(self, ngram: tuple[str, ...]) -> str:
        """Return the location of a text that contains the n-gram; "" where there is none."""
        number = self.first_text.get(hash(ngram))
        if number is None or ngram not in set(ngrams(split_words(self.texts[number]), self.ngram_words)):
            return ""
        return self.locations[number]


@lru_cache(maxsize=1)
def read_evaluation_texts(
    files: tuple[str, ...], sha256: tuple[str, ...], columns: tuple[str, ...], ngram_words: int
) -> EvaluationTexts:
    """Read and index all evaluation texts, which takes about 150 bytes of memory per word.

    The result is cached; `sha256`, the hashes of the files, makes sure that changed files are read again.

    Raises:
        UserError: a file cannot be read, or a column is missing or not text.
    """
    first_text: dict[int, int] = {}
    locations: list[str] = []
    texts: list[str] = []
    short_texts = 0
    for file in files:
        for row in read_rows(FileRange(Path(file), "auto"), WantedColumns(columns), _MAX_ROW_BYTES):
            if isinstance(row.values, BadData):
                raise row.values
            for column, value in zip(columns, row.values, strict=True):
                if not isinstance(value, str):
                    found = type(value).__name__
                    raise InputError(
                        f"{row.where}: {column} is {found}, not a string",
                        "name columns with text in decontaminate.columns",
                    )
                words = split_words(value)
                short_texts += len(words) < ngram_words
                for ngram in ngrams(words, ngram_words):
                    first_text.setdefault(hash(ngram), len(texts))
                locations.append(str(row.where))
                texts.append(value)
    return EvaluationTexts(first_text.keys(), first_text, locations, texts, short_texts, ngram_words)
