"""Texts as rows of words, for near duplicates and evaluation texts: case, punctuation and spacing do not count."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# Scripts that are written without spaces (Thai to Khmer, kana, Han): each letter is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def runs(row: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """Every run of `length` neighbouring words; none where there are fewer."""
    return zip(*(row[start:] for start in range(length)), strict=False)
