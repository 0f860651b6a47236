"""Splits texts into words and word n-grams; ignores case, punctuation and spaces."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# Scripts without spaces between words (Thai to Khmer, kana, Han): each letter counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return _WORD.findall(text.lower())


def ngrams(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """Yield every run of `length` consecutive words; nothing for fewer words."""
    return zip(*(words[start:] for start in range(length)), strict=False)
