"""Texts -> ids, by two encoders that must agree: `tokenizers` (the reference, which AutoTokenizer runs) and gigatoken.

gigatoken reads byte-level BPE alone and is some thirty times faster. It is believed only as far as it is checked:
choose_encoder.py compares both on hard texts and on a sample of the corpus, and every unit on pieces of its documents.
N tokens, D texts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

Span = tuple[int, int]


class Rows(NamedTuple):
    """tokens [N], lengths [D] int64: the ids of D texts, one after another."""

    tokens: np.ndarray
    lengths: np.ndarray


class Reference:
    """`tokenizers`, one thread; loaded when it is first asked."""

    name = "tokenizers"

    def __init__(self, folder: Path) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._folder = folder

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _bare(self) -> Any:
        """Without a post-processor offsets keep the spaces of a token, and they are in the loss as well."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(_without_post_processor(self._folder))

    def load(self) -> None:
        """Now, that is, and for the processes that are forked later."""
        _ = self._tokenizer

    def encode(self, texts: Sequence[str]) -> Rows:
        """Ids with the special tokens that the tokenizer adds to a text."""
        return _rows([encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))])

    def encode_with_mask(self, texts: Sequence[str], spans: Sequence[list[Span]]) -> tuple[Rows, np.ndarray]:
        """Ids without added special tokens, and [N] uint8: 1 where a token overlaps one of its text's spans."""
        encodings = self._bare.encode_batch(list(texts), add_special_tokens=False)
        places = (np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) for encoding in encodings)
        masks = [_overlap(place[:, 0], place[:, 1], rows) for place, rows in zip(places, spans, strict=True)]
        return _rows([encoding.ids for encoding in encodings]), np.concatenate([np.empty(0, np.uint8), *masks])


class Fast:
    """gigatoken, one thread, for byte-level BPE. Raises what it raises for a tokenizer that it cannot read."""

    name = "gigatoken"

    def __init__(self, folder: Path, reference: Reference) -> None:
        import gigatoken

        self._tokenizer: Any = gigatoken.Tokenizer.from_json((folder / "tokenizer.json").read_bytes())
        self._reference = reference
        self._prefix, self._suffix = added_ids(settings_of(folder).post_processor)
        self._bytes_of: np.ndarray | None = None

    def encode(self, texts: Sequence[str]) -> Rows:
        """As Reference.encode."""
        rows = self._encode(list(texts))
        return with_added(rows, self._prefix, self._suffix)

    def encode_with_mask(self, texts: Sequence[str], spans: Sequence[list[Span]]) -> tuple[Rows, np.ndarray]:
        """As Reference.encode_with_mask, which also does the texts whose bytes the tokens do not spell out."""
        data = [text.encode() for text in texts]
        rows = self._encode(data)
        ends = np.cumsum(self._token_bytes()[rows.tokens])
        masks, first, spelt = [], 0, 0
        for text, raw, length, stretches in zip(texts, data, rows.lengths.tolist(), spans, strict=True):
            stops = ends[first : first + length] - spelt
            if length and int(stops[-1]) != len(raw):
                return self._reference.encode_with_mask(texts, spans)
            starts = np.concatenate([[0], stops[:-1]])
            masks.append(_overlap(starts, stops, _byte_spans(text, raw, stretches)))
            first, spelt = first + length, spelt + len(raw)
        return rows, np.concatenate([np.empty(0, np.uint8), *masks])

    def _encode(self, data: list[str] | list[bytes]) -> Rows:
        layout = self._tokenizer.encode_batch(data, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        tokens = np.asarray(layout.content.data)[int(offsets[0]) : int(offsets[-1])]
        return Rows(tokens, np.diff(offsets).astype(np.int64))

    def _token_bytes(self) -> np.ndarray:
        if self._bytes_of is None:
            vocabulary: dict[int, bytes] = self._tokenizer.vocab
            self._bytes_of = np.zeros(max(vocabulary) + 1, dtype=np.int64)
            for number, spelling in vocabulary.items():
                self._bytes_of[number] = len(spelling)
        return self._bytes_of


def added_ids(post_processor: Any) -> tuple[list[int], list[int]]:
    """What a post-processor of a tokenizer.json puts before and behind a text (BOS, most often).

    It is tried on a vocabulary of one word, as loading the whole one takes a fifth of a second.
    """
    from tokenizers import Tokenizer

    unset = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder"))
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    tiny = {"version": "1.0", "added_tokens": [], **unset, "post_processor": post_processor, "model": model}
    encoding = Tokenizer.from_str(json.dumps(tiny)).encode("a")
    place = encoding.special_tokens_mask.index(0)
    return encoding.ids[:place], encoding.ids[place + 1 :]


class Settings(NamedTuple):
    """Of a tokenizer.json without its vocabulary: why gigatoken is not to read it ("" if it may), and what it adds to texts."""

    unfit: str
    post_processor: Any
    added_tokens: list[str]


@lru_cache(maxsize=4)
def settings_of(folder: Path) -> Settings:
    """Kept, as parsing the vocabulary takes its time."""
    found = orjson.loads((folder / "tokenizer.json").read_bytes())
    added = [token["content"] for token in found.get("added_tokens", [])]
    return Settings(_unfit(found), found.get("post_processor"), added)


def _unfit(settings: dict[str, Any]) -> str:
    """Why a tokenizer.json is not gigatoken's to read; "" when it is."""
    model, normalizer = settings["model"], settings.get("normalizer")
    if model.get("type") != "BPE" or '"ByteLevel"' not in json.dumps(settings.get("pre_tokenizer")):
        return f"{model.get('type')} is not byte-level BPE"
    if model.get("dropout"):
        return "BPE dropout is random"
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    odd = [step["type"] for step in steps if step["type"] != "NFC"]
    return f"normalizer {odd[0]}" if odd else ""


@lru_cache(maxsize=4)
def open_reference(folder: Path) -> Reference:
    """Of a tokenizer folder; kept, as loading it takes a fifth of a second."""
    return Reference(folder)


@lru_cache(maxsize=4)
def open_fast(folder: Path) -> Fast:
    """Of a tokenizer folder; kept, as loading it takes half a second."""
    return Fast(folder, open_reference(folder))


def first_difference(fast: Fast, reference: Reference, texts: Sequence[str], theirs: Rows | None = None) -> str:
    """What the encoders disagree on first, for people; "" when all ids are equal. theirs: the reference's, where known."""
    ours, theirs = fast.encode(texts), theirs or reference.encode(texts)
    if np.array_equal(ours.lengths, theirs.lengths) and np.array_equal(ours.tokens, theirs.tokens):
        return ""
    for text in texts:
        if fast.encode([text]).tokens.tolist() != reference.encode([text]).tokens.tolist():
            return f"gigatoken gives other ids than tokenizers for {text[:60]!r}"
    return "gigatoken gives other ids in a batch than alone"


def with_added(rows: Rows, prefix: Sequence[int], suffix: Sequence[int], last: int | None = None) -> Rows:
    """Every row between prefix and suffix; then `last`, where a row does not already end with it."""
    extra = np.full(len(rows.lengths), len(prefix) + len(suffix), dtype=np.int64)
    if last is not None:
        extra += ~_ends_with(rows, suffix, last)
    if not extra.any():
        return rows
    lengths = rows.lengths + extra
    ends = np.cumsum(lengths)
    starts = ends - lengths
    made = np.empty(int(lengths.sum()), dtype=rows.tokens.dtype)
    is_body = np.ones(len(made), dtype=bool)
    bodies_end = starts + len(prefix) + rows.lengths
    if last is not None:
        added = ends[extra > len(prefix) + len(suffix)] - 1
        made[added], is_body[added] = last, False
    for places, ids in ((starts, prefix), (bodies_end, suffix)):
        for offset, number in enumerate(ids):
            made[places + offset], is_body[places + offset] = number, False
    made[is_body] = rows.tokens
    return Rows(made, lengths)


def _ends_with(rows: Rows, suffix: Sequence[int], last: int) -> np.ndarray:
    """[D] bool."""
    if suffix:
        return np.full(len(rows.lengths), suffix[-1] == last)
    found = np.zeros(len(rows.lengths), dtype=bool)
    filled = rows.lengths > 0
    found[filled] = rows.tokens[np.cumsum(rows.lengths)[filled] - 1] == last
    return found


def _rows(ids: list[list[int]]) -> Rows:
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    tokens = np.fromiter((number for row in ids for number in row), np.uint32, int(lengths.sum()))
    return Rows(tokens, lengths)


def _overlap(starts: np.ndarray, ends: np.ndarray, spans: list[Span]) -> np.ndarray:
    mask = np.zeros(len(starts), dtype=np.uint8)
    for start, end in spans:
        mask[(starts < end) & (ends > start)] = 1
    return mask


def _byte_spans(text: str, raw: bytes, spans: list[Span]) -> list[Span]:
    """Stretches in characters -> in bytes of UTF-8."""
    if len(raw) == len(text):
        return spans
    return [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]


def _without_post_processor(folder: Path) -> str:
    settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return json.dumps({**settings, "post_processor": None, "truncation": None, "padding": None}, ensure_ascii=False)
