"""Generates the stress corpus: texts on which two tokenizers disagree if they disagree at all.

An encoder that gives the reference's ids for all of them gives the same ids for ordinary text.
"""

from __future__ import annotations

import random
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import product

_WORDS = [
    "a",
    "Wörter",
    "don't",
    "I'LL",
    "it’s",
    "北京",
    "привет",
    "שלום",
    "नमस्ते",
    "한글",
    "x1y2",
    "3.14",
    "🚢",
    "e\u0301",
]
_RUNS = [" ", "\n", "\t", "\r\n", "\r", " \n", "\n ", "\u00a0", "\u3000", "\u200b", "-", "=", "!", "(", "0", "9"]
_SEQUENCES = [
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪🇩🇪🇫 ☺️ 1️⃣",
    "Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319a\u0300\u0301\u0302\u0303\u0304",
    "o\u0308 ö \u1100\u1161\u11a8 각",
    "\ufeffleading and \ufeff inner marks, \u202eright to left\u202c, soft\u00adhyphen, \u2028 line \u2029 paragraph",
    "ﬁ ﬂ Ⅻ ½ ² ﷺ İ ı ß ẞ ǅ ŉ \u212b \u2126 \uff21\uff22\uff11",
    "if (x<=0) {\n\t\treturn -1;  // no\n\t}\n\n\n    def f(self, *a, **k) -> None:\n        pass\n#!/bin/sh\n$HOME/*.txt\r\n",
    "https://a.b/c?d=e&f=%20#g user@host.org C:\\dir\\file 1,234,567.89 0x7fFf 1e-10 12345678901234567890",
    '{"key": [1, 2.5, null, true], "s": "\\u00e9\\n"}<p class="x">&nbsp;</p>\\begin{equation}\\frac{a}{b}$x_1^2$',
    "I'm you're he'll we'd they've o'clock 'tis 'S 'T 'RE 'VE 'M 'LL 'D ''s ’s ’t",
]


def stress_texts(special_tokens: Sequence[str]) -> list[str]:
    """Return about a megabyte of texts, the same for the same special tokens.

    It contains every Unicode block, runs of spaces, long words, control characters, texts that resemble special
    tokens, and random mixtures.
    """
    return [
        *_unicode_blocks(),
        *_SEQUENCES,
        *(f"a{run * count}b {run * count}" for run in _RUNS for count in (1, 2, 3, 4, 7, 8, 15, 16, 33, 129)),
        *(f"{left}{gap}{right}" for left, gap, right in product(_WORDS, ("", " ", "  ", "\n", "'", "_"), _WORDS)),
        *(word * (3000 // len(word)) for word in ("a", "ab", "é", "北京", "xyz1", "A", "_", "🚢", "ก", "aA", "http")),
        *(f"x{chr(code)}y {chr(code)}{chr(code)}" for code in (*range(32), *range(127, 160))),
        *_like_special_tokens(special_tokens[:300]),
        *_random_mixtures(),
    ]


def _unicode_blocks() -> Iterator[str]:
    """Yield every assigned character in rows of 256: first without spaces, then with a space between characters.

    Planes 4 to 13 have no assigned characters.
    """
    rows: list[list[str]] = []
    for start in (*range(0, 0x40000, 256), *range(0xE0000, sys.maxunicode, 256)):
        row = map(chr, range(start, start + 256))
        rows.append([character for character in row if unicodedata.category(character) not in ("Cn", "Cs", "Co")])
    yield from map("".join, filter(None, rows))
    yield from map(" ".join, filter(None, rows))
    yield "\ue000\uf8ff\U000f0000\U0010fffd"


def _like_special_tokens(tokens: Sequence[str]) -> Iterator[str]:
    for token in tokens:
        yield f"{token}x{token}{token} {token}  {token}\n{token}\n\n y{token}z"
        yield f"{token[:-1]} {token[1:]} {token[:1]} {token[1:]} {token.upper()} {token.lower()} {' '.join(token)}"
        yield token


def _random_mixtures() -> Iterator[str]:
    """Yield random mixtures of words, runs and characters; the fixed seed gives the same texts every time."""
    generator = random.Random(0)  # nosec B311  # test texts
    pieces = [*_WORDS, *_RUNS, *"abcXYZ012 \n\t.,;:'\"<>|/\\{}[]éß京н🙂\u0301\u200d"]
    for _ in range(300):
        yield "".join(generator.choice(pieces) for _ in range(generator.randrange(1, 200)))
