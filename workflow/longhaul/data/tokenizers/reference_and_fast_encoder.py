"""Implements the two encoders, tokenizers and gigatoken, and says which tokenizers the fast one supports.

The reference encoder is `tokenizers`, which AutoTokenizer runs. The fast encoder is gigatoken: it supports only
byte-level BPE and is about thirty times faster. The fast encoder is used only where its ids are verified:
choose_encoder.py compares both encoders on the stress corpus and on a sample of the dataset, and every chunk compares
them on excerpts of its documents.
N tokens, D texts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from longhaul.data.tokenizers.chat_template import Span
from longhaul.data.tokenizers.control_tokens import ControlTokens
from longhaul.data.tokenizers.token_rows import TokenRows, add_special_ids, byte_spans, flatten_rows, overlap_mask
from longhaul.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BARS = re.compile(r"<[|｜].*[|｜]>$")


class ReferenceEncoder:
    """`tokenizers` with one thread. The tokenizer is loaded on first use."""

    name = "tokenizers"

    def __init__(self, folder: Path) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._folder = folder

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _tokenizer_without_post_processor(self) -> Tokenizer:
        """The same tokenizer without its post-processor.

        The offsets then include the space of a token, so that the space counts in the loss as well.
        """
        from tokenizers import Tokenizer

        return Tokenizer.from_str(_without_post_processor(self._folder))

    def load(self) -> None:
        """Load the tokenizer now, so that processes forked later inherit it."""
        _ = self._tokenizer

    def encode(self, texts: Sequence[str]) -> TokenRows:
        """Return the ids of each text, with the special tokens that the tokenizer adds."""
        return flatten_rows([encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))])

    def encode_with_mask(self, texts: Sequence[str], spans: Sequence[list[Span]]) -> tuple[TokenRows, np.ndarray]:
        """Return the ids without added special tokens, and a mask [N] uint8.

        The mask is 1 where a token overlaps one of its text's spans (in characters).
        """
        encodings = self._tokenizer_without_post_processor.encode_batch(list(texts), add_special_tokens=False)
        offsets = (np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) for encoding in encodings)
        masks = [
            overlap_mask(of_text[:, 0], of_text[:, 1], spans_of_text)
            for of_text, spans_of_text in zip(offsets, spans, strict=True)
        ]
        return flatten_rows([encoding.ids for encoding in encodings]), np.concatenate([np.empty(0, np.uint8), *masks])


class ControlTextEncoder(ReferenceEncoder):
    """Encodes texts of ControlTokens.exchange: placeholders become control tokens, the text of a control token stays text."""

    def __init__(self, folder: Path, control_tokens: ControlTokens) -> None:
        super().__init__(folder)
        self._control_tokens = control_tokens

    @cached_property
    def _tokenizer_without_post_processor(self) -> Tokenizer:
        from tokenizers import Tokenizer

        settings = json.loads(_without_post_processor(self._folder))
        for token in settings["added_tokens"]:
            token["content"] = self._control_tokens.placeholders.get(token["content"], token["content"])
        return Tokenizer.from_str(json.dumps(settings, ensure_ascii=False))

    @cached_property
    def _original_ids(self) -> dict[int, int]:
        """The id of each added token in the changed tokenizer -> its id in the tokenizer.

        A renamed token that was in the model's vocabulary gets a new id, and so do added tokens behind it.
        """
        new, old = self._tokenizer_without_post_processor, self._tokenizer
        placeholders = self._control_tokens.placeholders
        names = read_settings(self._folder).added_tokens
        return {_id_of(new, placeholders.get(name, name)): _id_of(old, name) for name in names}

    @cached_property
    def _control_ids(self) -> set[int]:
        return {_id_of(self._tokenizer, token) for token in self._control_tokens.placeholders}

    def encode_with_mask(self, texts: Sequence[str], spans: Sequence[list[Span]]) -> tuple[TokenRows, np.ndarray]:
        """Encode like ReferenceEncoder.encode_with_mask."""
        rows, mask = super().encode_with_mask(texts, spans)
        if (self._control_ids - self._original_ids.keys()).intersection(rows.tokens.tolist()):
            message = "the tokenizer cannot encode the text of a control token as plain text"
            raise UserError(message, "remove that text, or set allow_control_tokens: true")
        ids = [self._original_ids.get(token, token) for token in rows.tokens.tolist()]
        return TokenRows(np.array(ids, dtype=rows.tokens.dtype), rows.lengths), mask


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that the tokenizer has."""
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None, token
    return token_id


class FastEncoder:
    """gigatoken with one thread, for byte-level BPE.

    The constructor passes on any exception that gigatoken raises for a tokenizer that it cannot load.
    """

    name = "gigatoken"

    def __init__(self, folder: Path, reference: ReferenceEncoder) -> None:
        import gigatoken

        self._tokenizer: Any = gigatoken.Tokenizer.from_json((folder / "tokenizer.json").read_bytes())
        self._reference = reference
        self._prefix, self._suffix = post_processor_ids(read_settings(folder).post_processor)
        self._bytes_of_token: np.ndarray | None = None

    def encode(self, texts: Sequence[str]) -> TokenRows:
        """Encode like ReferenceEncoder.encode."""
        rows = self._encode(list(texts))
        return add_special_ids(rows, self._prefix, self._suffix)

    def encode_with_mask(self, texts: Sequence[str], spans: Sequence[list[Span]]) -> tuple[TokenRows, np.ndarray]:
        """Encode like ReferenceEncoder.encode_with_mask.

        The reference encodes the batch where the tokens' bytes do not add up to the bytes of a text: then the
        positions of tokens in that text are unknown.
        """
        data = [text.encode() for text in texts]
        rows = self._encode(data)
        ends = np.cumsum(self._token_bytes()[rows.tokens])
        masks, first_token, first_byte = [], 0, 0
        for text, text_bytes, length, text_spans in zip(texts, data, rows.lengths.tolist(), spans, strict=True):
            stops = ends[first_token : first_token + length] - first_byte
            if length and int(stops[-1]) != len(text_bytes):
                return self._reference.encode_with_mask(texts, spans)
            starts = np.concatenate([[0], stops[:-1]])
            masks.append(overlap_mask(starts, stops, byte_spans(text, text_bytes, text_spans)))
            first_token, first_byte = first_token + length, first_byte + len(text_bytes)
        return rows, np.concatenate([np.empty(0, np.uint8), *masks])

    def _encode(self, data: list[str] | list[bytes]) -> TokenRows:
        layout = self._tokenizer.encode_batch(data, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        tokens = np.asarray(layout.content.data)[int(offsets[0]) : int(offsets[-1])]
        return TokenRows(tokens, np.diff(offsets).astype(np.int64))

    def _token_bytes(self) -> np.ndarray:
        """Return the bytes of each token of the vocabulary, by id."""
        if self._bytes_of_token is None:
            vocabulary: dict[int, bytes] = self._tokenizer.vocab
            self._bytes_of_token = np.zeros(max(vocabulary) + 1, dtype=np.int64)
            for token, spelling in vocabulary.items():
                self._bytes_of_token[token] = len(spelling)
        return self._bytes_of_token


def post_processor_ids(post_processor: object) -> tuple[list[int], list[int]]:
    """Return the ids that a post-processor of a tokenizer.json puts before and after a text (most often BOS).

    The post-processor runs with a vocabulary of one word: loading the whole vocabulary takes 0.2 s.
    """
    from tokenizers import Tokenizer

    unset = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder"))
    word = "a"
    model = {"type": "WordLevel", "vocab": {word: 0}, "unk_token": word}
    tiny = {"version": "1.0", "added_tokens": [], **unset, "post_processor": post_processor, "model": model}
    encoding = Tokenizer.from_str(json.dumps(tiny)).encode("a")
    position = encoding.special_tokens_mask.index(0)
    return encoding.ids[:position], encoding.ids[position + 1 :]


class TokenizerSettings(NamedTuple):
    """Content of a tokenizer.json, without the vocabulary.

    unsupported:    why the fast encoder does not support this tokenizer; "" where it does.
    control_tokens: the added tokens that are special, or written like <|user|> or <｜User｜>, as turns of DeepSeek R1 begin.
    """

    unsupported: str
    post_processor: object
    added_tokens: list[str]
    control_tokens: list[str]


@lru_cache(maxsize=4)
def read_settings(folder: Path) -> TokenizerSettings:
    """Read a tokenizer folder's settings; cached, because parsing the vocabulary is slow."""
    found = orjson.loads((folder / "tokenizer.json").read_bytes())
    added = found.get("added_tokens", [])
    control = [token["content"] for token in added if token.get("special") or _BARS.match(token["content"])]
    names = [token["content"] for token in added]
    return TokenizerSettings(_why_unsupported(found), found.get("post_processor"), names, control)


def _why_unsupported(settings: dict[str, Any]) -> str:
    """Return why the fast encoder does not support a tokenizer.json; "" where it does."""
    model, normalizer = settings["model"], settings.get("normalizer")
    if model.get("type") != "BPE" or '"ByteLevel"' not in json.dumps(settings.get("pre_tokenizer")):
        return f"{model.get('type')} is not byte-level BPE"
    if model.get("dropout"):
        return "BPE dropout is random"
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    unsupported = [step["type"] for step in steps if step["type"] != "NFC"]
    return f"normalizer {unsupported[0]}" if unsupported else ""


@lru_cache(maxsize=4)
def open_reference(folder: Path) -> ReferenceEncoder:
    """Return the reference encoder of a tokenizer folder; cached, because loading takes 0.2 s."""
    return ReferenceEncoder(folder)


@lru_cache(maxsize=4)
def open_fast(folder: Path) -> FastEncoder:
    """Return the fast encoder of a tokenizer folder; cached, because loading takes 0.5 s."""
    return FastEncoder(folder, open_reference(folder))


def first_difference(
    fast: FastEncoder, reference: ReferenceEncoder, texts: Sequence[str], expected: TokenRows | None = None
) -> str:
    """Describe the first difference between the encoders' ids for people; return "" when all ids are equal.

    expected: the reference's ids, where the caller has them already.
    """
    found, expected = fast.encode(texts), expected or reference.encode(texts)
    if np.array_equal(found.lengths, expected.lengths) and np.array_equal(found.tokens, expected.tokens):
        return ""
    for text in texts:
        if fast.encode([text]).tokens.tolist() != reference.encode([text]).tokens.tolist():
            return f"gigatoken and tokenizers give different ids for {text[:60]!r}"
    return "gigatoken gives different ids in a batch than for single texts"


def _without_post_processor(folder: Path) -> str:
    settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return json.dumps({**settings, "post_processor": None, "truncation": None, "padding": None}, ensure_ascii=False)
