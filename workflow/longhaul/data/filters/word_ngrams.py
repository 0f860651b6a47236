"""Splits texts into words and word n-grams; ignores case, punctuation, spaces, and how Unicode writes a letter."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

import regex

# Scripts without spaces between words (Thai to Khmer, kana, Han): each letter counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Vowel signs of Indic scripts are marks (M), and no letters of `\w`.
_WORD = regex.compile(rf"[{_UNSPACED}]|[[\w\p{{M}}]--[{_UNSPACED}]]+", regex.V1)
_FORM = "NFKC"
WORD_RULES = [_FORM, _WORD.pattern]
"""Everything that decides the words of a text."""


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case. Full-width letters, ligatures and separate accents become the usual letters."""
    return _WORD.findall(unicodedata.normalize(_FORM, text).lower())


def ngrams(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """Yield every run of `length` consecutive words; nothing for fewer words."""
    return zip(*(words[start:] for start in range(length)), strict=False)
