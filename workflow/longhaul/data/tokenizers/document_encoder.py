"""Documents -> token ids, loss masks and split keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from longhaul.artifacts.files import canonical_json
from longhaul.artifacts.schemas import TokenizerManifest
from longhaul.config.dataset_config import Dataset
from longhaul.data.readers.documents import Document, texts
from longhaul.data.readers.rows import BadData
from longhaul.data.shards.indexed_dataset import token_dtype
from longhaul.data.tokenizers.chat_template import ChatTemplate, without_reasoning
from longhaul.data.tokenizers.encoders import Fast, first_difference, open_fast, open_reference, with_added

_BATCH_CHARACTERS = 1 << 20  # beside its ids it fits a core's cache
_BATCH_DOCUMENTS = 8192
_CHECKED_PER_BATCH = 4
_CHECKED_CHARACTERS = 250
_CHECKED_AT_ONCE = 256


_MOST_BYTES = {
    ("gigatoken", "text"): 80_000_000,
    ("gigatoken", "chat"): 24_000_000,
    ("tokenizers", "text"): 4_000_000,
    ("tokenizers", "chat"): 4_000_000,
}
"""Of a document, by encoder and kind, so that a worker stays below 1 GiB: 12, 28 and 130 to 170 bytes of memory a byte."""


class EncodersDisagree(Exception):
    """The fast encoder's ids are not the reference's: the dataset has to be encoded by the reference."""


@dataclass(frozen=True)
class Encoded:
    """One batch of D documents with N tokens in all.

    tokens [N] uint16 or int32, lengths [D] int32, mask [N] uint8 for chats, keys [D] uint64 (document hashes),
    left_out: what is wrong with the documents that are not in it.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray | None
    keys: np.ndarray
    left_out: list[BadData]


class Encoder:
    """Turns batches into ids with one thread."""

    def __init__(self, manifest: TokenizerManifest, dataset: Dataset, encoder: str) -> None:
        folder = Path(manifest.path)
        self._reference = open_reference(folder)
        self._fast = open_fast(folder) if encoder == Fast.name else None
        self._encoder = self._fast or self._reference
        self._vocab_size = manifest.vocab_size
        self._pieces: list[str] = []
        self._most_bytes = _MOST_BYTES[encoder, dataset.kind]
        self._eos_id = manifest.eos_id
        self._dtype = np.dtype(token_dtype(manifest.vocab_size))
        self._template = ChatTemplate.load(folder) if dataset.kind == "chat" else None
        self._reasoning_in_loss = dataset.reasoning_in_loss

    def encode(self, documents: Sequence[Document]) -> Encoded:
        """Ids of each document; what a chat template refuses is left out. EncodersDisagree as `check`, now or later."""
        left_out = [self._too_long(document) for document in documents if self._is_too_long(document)]
        documents = [document for document in documents if not self._is_too_long(document)] if left_out else documents
        if self._template is None:
            left_out += [_nothing(document, "empty text") for document in documents if not document.content]
            kept = [document for document in documents if document.content]
            rendered = [(str(document.content), []) for document in kept]
        else:
            kept, rendered, refused = self._render(self._template, documents)
            left_out += refused
        written = [text for text, _ in rendered]
        if self._fast:
            # A unit's first pieces are twice as long: units of small files have no others.
            self._pieces += _pieces(written, _CHECKED_CHARACTERS * (1 if self._pieces else 2))
            if len(self._pieces) >= _CHECKED_AT_ONCE:
                self.check()
        if self._template is None:
            # BOS where the tokenizer adds one, then EOS, once.
            rows, mask = with_added(self._encoder.encode(written), (), (), self._eos_id), None
        else:
            rows, mask = self._encoder.encode_with_mask(written, [spans for _, spans in rendered])
        if self._fast:
            self._require_known(rows.tokens)
        return Encoded(
            tokens=rows.tokens.astype(self._dtype) if self._dtype.itemsize < 4 else rows.tokens.view(self._dtype),
            lengths=rows.lengths.astype(np.int32),
            mask=mask,
            keys=np.array([document_key(document) for document in kept], dtype=np.uint64),
            left_out=left_out,
        )

    def _is_too_long(self, document: Document) -> bool:
        return 4 * _size(document) > self._most_bytes and _size_bytes(document) > self._most_bytes

    def _too_long(self, document: Document) -> BadData:
        most = f"the {self._most_bytes / 1e6:g} MB that {self._encoder.name} encodes within 1 GiB of memory"
        message = f"{document.where}: {_size_bytes(document) / 1e6:.1f} MB of text, more than {most}"
        return BadData.because("too long", message, "cut the document, or leave such documents out: bad_rows: skip")

    def _render(self, template: ChatTemplate, documents: Sequence[Document]) -> tuple[list[Document], list[Any], Any]:
        kept, rendered, left_out = [], [], []
        for document in documents:
            messages: Any = document.content
            if not any(message["role"] == "assistant" for message in messages):
                left_out.append(_nothing(document, "no assistant turn"))
                continue
            try:
                text, spans = template.render(messages, document.where)
            except BadData as error:
                left_out.append(error)
                continue
            rendered.append((text, spans if self._reasoning_in_loss else without_reasoning(text, spans)))
            kept.append(document)
        return kept, rendered, left_out

    def _require_known(self, tokens: np.ndarray) -> None:
        largest = int(tokens.max(initial=0))
        if largest >= self._vocab_size:
            self.check()
            raise EncodersDisagree(f"{Fast.name} gives id {largest} of a vocabulary of {self._vocab_size}")

    def check(self) -> None:
        """Compares pieces of what was encoded since the last time with the reference; EncodersDisagree.

        All at once, as the reference takes twice as long while its vocabulary is not in the cache.
        """
        pieces, self._pieces = self._pieces, []
        if self._fast and (difference := first_difference(self._fast, self._reference, pieces)):
            raise EncodersDisagree(difference)


def _pieces(texts: Sequence[str], characters: int) -> Iterator[str]:
    """Of a few texts, spread over the batch, a piece each: the first one's beginning, the last one's end.

    Short ones of more texts find more than long ones of fewer, and the reference is slow.
    """
    some = texts[:: max(1, len(texts) // _CHECKED_PER_BATCH)][:_CHECKED_PER_BATCH]
    for number, text in enumerate(some):
        start = max(0, len(text) - characters) * number // max(1, len(some) - 1)
        yield text[start : start + characters]


def document_key(document: Document) -> int:
    """XXH3 (64 bits) of the text, or of the conversation's canonical JSON: decides the split, for any tokenizer.

    It takes a tenth of the time of a cryptographic hash, and nobody gains by two documents with one key.
    """
    content = document.content
    text = content if isinstance(content, str) else canonical_json(content)
    return xxhash.xxh3_64_intdigest(text.encode())


def _nothing(document: Document, reason: str) -> BadData:
    """Left out whatever the policy: there is nothing in it to train on."""
    return BadData.because(reason, f"{document.where}: {reason}", "nothing to train on")


NOTHING_TO_TRAIN_ON = ("empty text", "no assistant turn")


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Consecutive documents of some million characters."""
    held: list[Document] = []
    characters = 0
    for document in documents:
        held.append(document)
        characters += _size(document)
        if characters >= _BATCH_CHARACTERS or len(held) >= _BATCH_DOCUMENTS:
            yield held
            held, characters = [], 0
    if held:
        yield held


def _size(document: Document) -> int:
    """Characters."""
    content = document.content
    return len(content) if isinstance(content, str) else sum(map(len, texts(document)))


def _size_bytes(document: Document) -> int:
    return sum(len(text.encode()) for text in texts(document))
