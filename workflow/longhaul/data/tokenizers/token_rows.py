"""Joins token ids of several texts into flat arrays, adds BOS and EOS, and turns text spans into token masks.

N tokens, D texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from longhaul.data.tokenizers.chat_template import Span


class TokenRows(NamedTuple):
    """tokens [N], lengths [D] int64: the ids of D texts, one text after another."""

    tokens: np.ndarray
    lengths: np.ndarray


def flatten_rows(ids: list[list[int]]) -> TokenRows:
    """Convert one list of ids per text to flat arrays; tokens are uint32."""
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    tokens = np.fromiter((token for row in ids for token in row), np.uint32, int(lengths.sum()))
    return TokenRows(tokens, lengths)


def add_special_ids(
    rows: TokenRows, prefix: Sequence[int], suffix: Sequence[int], last: int | None = None
) -> TokenRows:
    """Put every row between prefix and suffix. Then append `last` to each row that does not already end with it."""
    extra = np.full(len(rows.lengths), len(prefix) + len(suffix), dtype=np.int64)
    if last is not None:
        extra += ~_ends_with(rows, suffix, last)
    if not extra.any():
        return rows
    lengths = rows.lengths + extra
    ends = np.cumsum(lengths)
    starts = ends - lengths
    tokens = np.empty(int(lengths.sum()), dtype=rows.tokens.dtype)
    is_body = np.ones(len(tokens), dtype=bool)
    body_ends = starts + len(prefix) + rows.lengths
    if last is not None:
        appended = ends[extra > len(prefix) + len(suffix)] - 1
        tokens[appended], is_body[appended] = last, False
    for positions, ids in ((starts, prefix), (body_ends, suffix)):
        for offset, token in enumerate(ids):
            tokens[positions + offset], is_body[positions + offset] = token, False
    tokens[is_body] = rows.tokens
    return TokenRows(tokens, lengths)


def _ends_with(rows: TokenRows, suffix: Sequence[int], last: int) -> np.ndarray:
    """Return [D] bool: True for rows that end with `last` once `suffix` is appended."""
    if suffix:
        return np.full(len(rows.lengths), suffix[-1] == last)
    found = np.zeros(len(rows.lengths), dtype=bool)
    is_filled = rows.lengths > 0
    found[is_filled] = rows.tokens[np.cumsum(rows.lengths)[is_filled] - 1] == last
    return found


def select_documents(values: np.ndarray, lengths: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """Return the values of the selected documents.

    values [N] belong to documents with lengths [D]; selected [D] bool. Consecutive documents are copied as one slice.
    """
    if selected.all():
        return values
    edges = np.flatnonzero(np.diff(np.r_[False, selected, False]))
    slices = np.r_[0, np.cumsum(lengths)][edges].reshape(-1, 2)
    return np.concatenate([values[:0], *(values[start:stop] for start, stop in slices.tolist())])


def overlap_mask(starts: np.ndarray, ends: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Return [N] uint8: 1 for tokens [start, end) that overlap one of the spans."""
    mask = np.zeros(len(starts), dtype=np.uint8)
    for start, end in spans:
        mask[(starts < end) & (ends > start)] = 1
    return mask


def byte_spans(text: str, text_bytes: bytes, spans: list[Span]) -> list[Span]:
    """Convert spans in characters to spans in bytes of UTF-8."""
    if len(text_bytes) == len(text):
        return spans
    return [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
