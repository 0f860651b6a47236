"""Encodes batches of documents as token ids with loss masks; leaves out empty ones and those above its limits of size; sets
the split key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.artifacts.atomic_files import canonical_json
from longhaul.config.dataset_config import Dataset
from longhaul.data.readers.read_documents import Document, document_texts
from longhaul.data.readers.rows_and_file_ranges import BadData
from longhaul.data.shards.indexed_dataset import token_dtype
from longhaul.data.tokenizers.chat_template import ChatTemplate, Rendered, Span, without_reasoning
from longhaul.data.tokenizers.control_tokens import ControlTokens, Marks, reasoning_marks
from longhaul.data.tokenizers.message_keys import (
    MessageKeyCount,
    UnreadKeys,
    require_contents_reached,
    require_keys_reached,
)
from longhaul.data.tokenizers.reference_and_fast_encoder import (
    ControlTextEncoder,
    FastEncoder,
    first_difference,
    open_fast,
    open_reference,
    read_settings,
)
from longhaul.data.tokenizers.token_rows import TokenRows, add_special_ids, select_documents

NOTHING_TO_TRAIN_ON = ("empty text", "no assistant turn", "no assistant turn with a weight", "no loss token")
"""Reasons that leave out a document under every `bad_rows` policy."""

_BATCH_CHARACTERS = 1 << 20  # such a batch and its ids fit into the cache of a CPU core
_BATCH_DOCUMENTS = 8192
_EXCERPTS_PER_BATCH = 4
_EXCERPT_CHARACTERS = 250
_EXCERPTS_PER_CHECK = 256
_MAX_DOCUMENT_BYTES = {
    ("gigatoken", "text"): 80_000_000,
    ("gigatoken", "chat"): 24_000_000,
    ("tokenizers", "text"): 4_000_000,
    ("tokenizers", "chat"): 4_000_000,
}
"""Maximum bytes of a document by encoder and kind, so that a worker stays below 1 GiB.

The encoders need 12 and 28 (gigatoken) and 130 to 170 (tokenizers) bytes of memory per byte of text.
"""


class EncodersDisagree(Exception):
    """The fast encoder's ids differ from the reference's: the reference has to encode the dataset."""


@dataclass(frozen=True)
class EncodedBatch:
    """One batch of D documents with N tokens in all.

    tokens:   [N] uint16 or int32.
    lengths:  [D] int32, tokens of each document.
    mask:     [N] uint8, 1 = counts in the loss; None for texts.
    keys:     [D] uint64, see document_key.
    left_out: an error for each document of the batch that is not in these arrays.
    control_texts: conversations in which a message contains the text of a control token.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray | None
    keys: np.ndarray
    left_out: list[BadData]
    control_texts: int = 0


class _InLoss(NamedTuple):
    """A rendered conversation and its spans in the loss."""

    text: str
    spans: list[Span]
    has_control_text: bool


class DocumentEncoder:
    """Encodes batches of documents with one thread.

    Where the fast encoder is used, excerpts of the encoded texts are collected and compared with the reference:
    every _EXCERPTS_PER_CHECK excerpts, and whenever the caller calls `check`.
    """

    def __init__(self, manifest: TokenizerManifest, dataset: Dataset, encoder: str) -> None:
        folder = Path(manifest.path)
        self._reference = open_reference(folder)
        self._fast = open_fast(folder) if encoder == FastEncoder.name else None
        self._encoder = self._fast or self._reference
        self._vocab_size = manifest.vocab_size
        self._excerpts: list[str] = []
        self._max_bytes = _MAX_DOCUMENT_BYTES[encoder, dataset.kind]
        self._eos_id = manifest.eos_id
        self._dtype = np.dtype(token_dtype(manifest.vocab_size))
        names = read_settings(folder).control_tokens
        control_tokens = ControlTokens(() if dataset.allow_control_tokens else names)
        self._reasoning_marks = reasoning_marks(names)
        self._control_text_encoder = ControlTextEncoder(folder, control_tokens)
        self._template = ChatTemplate.load(folder, control_tokens) if dataset.kind == "chat" else None
        self._unread_keys = UnreadKeys(self._template) if self._template else None
        self._reasoning_in_loss = dataset.reasoning_in_loss

    def encode(self, documents: Sequence[Document]) -> EncodedBatch:
        """Encode one batch.

        Documents that are too long, empty, without an assistant turn, or that the chat template refuses are left out.

        Raises:
            EncodersDisagree: the fast encoder gave other ids than the reference, in this batch or an earlier one.
        """
        too_long = [self._too_long(document) for document in documents if self._is_too_long(document)]
        if too_long:
            documents = [document for document in documents if not self._is_too_long(document)]
        if self._template is None:
            return self._encode_texts(documents, too_long)
        return self._encode_chats(self._template, documents, too_long)

    def _encode_texts(self, documents: Sequence[Document], left_out: list[BadData]) -> EncodedBatch:
        """Encode texts: BOS where the tokenizer adds it, then the text, then EOS once."""
        left_out += [_nothing_to_train_on(document, "empty text") for document in documents if not document.content]
        kept = [document for document in documents if document.content]
        texts = [str(document.content) for document in kept]
        self._collect_excerpts(texts)
        rows = add_special_ids(self._encoder.encode(texts), (), (), self._eos_id)
        return self._batch(kept, rows, None, left_out)

    def _encode_chats(
        self, template: ChatTemplate, documents: Sequence[Document], left_out: list[BadData]
    ) -> EncodedBatch:
        """Encode conversations as the chat template renders them, with a loss mask."""
        kept: list[Document] = []
        rendered: list[_InLoss] = []
        for document in documents:
            found = self._render(template, document)
            if isinstance(found, BadData):
                left_out.append(found)
                continue
            kept.append(document)
            rendered.append(found)
        rows, mask = self._encode_rendered(rendered)
        return self._without_empty_masks(self._batch(kept, rows, mask, left_out), kept, rendered)

    def _encode_rendered(self, rendered: list[_InLoss]) -> tuple[TokenRows, np.ndarray]:
        """Encode rendered conversations; those with the text of a control token have an encoder of their own."""
        parts = []
        for has_control_text, group in groupby(rendered, attrgetter("has_control_text")):
            encoder = self._control_text_encoder if has_control_text else self._encoder
            texts, spans = zip(*((found.text, found.spans) for found in group), strict=True)
            if not has_control_text:
                self._collect_excerpts(texts)
            parts.append(encoder.encode_with_mask(texts, spans))
        if len(parts) == 1:
            return parts[0]
        tokens = np.concatenate([np.empty(0, np.uint32), *(rows.tokens for rows, _ in parts)])
        lengths = np.concatenate([np.empty(0, np.int64), *(rows.lengths for rows, _ in parts)])
        return TokenRows(tokens, lengths), np.concatenate([np.empty(0, np.uint8), *(mask for _, mask in parts)])

    def _batch(
        self, documents: Sequence[Document], rows: TokenRows, mask: np.ndarray | None, left_out: list[BadData]
    ) -> EncodedBatch:
        if self._fast:
            self._require_ids_in_vocabulary(rows.tokens)
        return EncodedBatch(
            tokens=rows.tokens.astype(self._dtype) if self._dtype.itemsize < 4 else rows.tokens.view(self._dtype),
            lengths=rows.lengths.astype(np.int32),
            mask=mask,
            keys=np.array([document_key(document) for document in documents], dtype=np.uint64),
            left_out=left_out,
        )

    def _is_too_long(self, document: Document) -> bool:
        # UTF-8 needs at most 4 bytes per character: this bound avoids encoding most documents.
        return 4 * _characters(document) > self._max_bytes and _text_bytes(document) > self._max_bytes

    def _too_long(self, document: Document) -> BadData:
        limit = f"the {self._max_bytes / 1e6:g} MB that {self._encoder.name} encodes within 1 GiB of memory"
        message = f"{document.where}: {_text_bytes(document) / 1e6:.1f} MB of text, more than {limit}"
        hint = "shorten the document, or leave out such documents with bad_rows: skip"
        return BadData.with_reason("too long", message, hint)

    def _render(self, template: ChatTemplate, document: Document) -> _InLoss | BadData:
        """Return a conversation's text and its spans that count in the loss, or why it is left out."""
        messages: Any = document.content
        weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
        if not any(weights):
            reason = "no assistant turn with a weight" if weights else "no assistant turn"
            return _nothing_to_train_on(document, reason)
        try:
            rendered = template.render(messages, document.where, document.tools)
            self._check_keys(template, rendered)
            spans = [self._spans_in_loss(template, rendered, turn) for turn in rendered.turns]
        except BadData as error:
            return error
        return _InLoss(rendered.text, list(chain.from_iterable(spans)), rendered.has_control_text)

    def _check_keys(self, template: ChatTemplate, rendered: Rendered) -> None:
        conversation = rendered.conversation
        text = template.text(conversation) if rendered.has_control_text else rendered.text
        dropped = require_contents_reached(template, conversation, text)
        has_keys = any(len(message) > len(("role", "content")) for message in conversation.messages)
        if conversation.tools or has_keys:
            dropped += require_keys_reached(template, conversation, text)
        if self._unread_keys and (dropped or has_keys):
            self._unread_keys.add(conversation, text, dropped)

    def _spans_in_loss(self, template: ChatTemplate, rendered: Rendered, turn: list[Span]) -> list[Span]:
        """Return the spans of a turn that count in the loss; BadData if they hold nothing but EOS."""
        exchange = template.control_tokens.exchange if rendered.has_control_text else str
        marks = [(exchange(begin), exchange(end)) for begin, end in self._reasoning_marks]
        spans = turn
        for pair in () if self._reasoning_in_loss else marks:
            spans = without_reasoning(rendered.text, spans, pair)
        target = "".join(rendered.text[start:end] for start, end in spans)
        if _is_only(target, exchange(template.eos), marks):
            message = f"{rendered.conversation.where}: an assistant turn has no text in the loss, only the EOS"
            hint = "remove the turn, or give it weight: 0; the model would learn to answer nothing"
            raise BadData.with_reason("empty assistant turn", message, hint)
        return spans

    def _without_empty_masks(self, batch: EncodedBatch, kept: list[Document], rendered: list[_InLoss]) -> EncodedBatch:
        """Leave out conversations without a token in the loss. The first token of a conversation is never predicted."""
        assert batch.mask is not None
        ends = np.cumsum(batch.lengths, dtype=np.int64)
        starts = ends - batch.lengths
        counts = np.r_[0, np.cumsum(batch.mask, dtype=np.int64)]
        has_loss = (batch.lengths > 1) & (counts[ends] > counts[np.minimum(starts + 1, ends)])
        control_texts = sum(found.has_control_text for found in rendered)
        if has_loss.all():
            return replace(batch, control_texts=control_texts)
        without = [document for document, has in zip(kept, has_loss, strict=True) if not has]
        return replace(
            batch,
            tokens=select_documents(batch.tokens, batch.lengths, has_loss),
            mask=select_documents(batch.mask, batch.lengths, has_loss),
            lengths=batch.lengths[has_loss],
            keys=batch.keys[has_loss],
            left_out=[*batch.left_out, *(_nothing_to_train_on(document, "no loss token") for document in without)],
            control_texts=control_texts,
        )

    def take_unread_keys(self) -> dict[str, MessageKeyCount]:
        """Return what UnreadKeys counted since the last call."""
        if self._unread_keys is None:
            return {}
        counts = self._unread_keys.counts()
        self._unread_keys.start_chunk()
        return counts

    def _require_ids_in_vocabulary(self, tokens: np.ndarray) -> None:
        largest = int(tokens.max(initial=0))
        if largest >= self._vocab_size:
            self.check()
            raise EncodersDisagree(f"{FastEncoder.name} gives id {largest} of a vocabulary of {self._vocab_size}")

    def _collect_excerpts(self, texts: Sequence[str]) -> None:
        """Keep excerpts of texts that the fast encoder encodes; check them when there are enough."""
        if not self._fast:
            return
        # The first excerpts of a chunk are twice as long: a chunk of small files may have no others.
        self._excerpts += _excerpts(texts, _EXCERPT_CHARACTERS * (1 if self._excerpts else 2))
        if len(self._excerpts) >= _EXCERPTS_PER_CHECK:
            self.check()

    def check(self) -> None:
        """Compare the excerpts collected since the last check with the reference; raise EncodersDisagree.

        Many excerpts are compared in one call: the reference takes twice as long while its vocabulary is not in the
        CPU's cache.
        """
        excerpts, self._excerpts = self._excerpts, []
        if self._fast and (difference := first_difference(self._fast, self._reference, excerpts)):
            raise EncodersDisagree(difference)


def _excerpts(texts: Sequence[str], characters: int) -> Iterator[str]:
    """Yield one excerpt from each of a few texts across the batch, from the first text's start to the last text's end.

    Short excerpts of many texts find more differences than long excerpts of few texts, and the reference is slow.
    """
    selected = texts[:: max(1, len(texts) // _EXCERPTS_PER_BATCH)][:_EXCERPTS_PER_BATCH]
    for number, text in enumerate(selected):
        start = max(0, len(text) - characters) * number // max(1, len(selected) - 1)
        yield text[start : start + characters]


def document_key(document: Document) -> int:
    """Return XXH3 (64 bits) of the text, or of the conversation's canonical JSON.

    The key decides the split, so that a document is in the same split under any tokenizer. XXH3 takes a tenth of the
    time of a cryptographic hash, and collisions are no security risk.
    """
    content = document.content
    if isinstance(content, str):
        text = content
    else:
        text = canonical_json({"messages": content, "tools": document.tools} if document.tools else content)
    return xxhash.xxh3_64_intdigest(text.encode())


def _is_only(target: str, eos: str, reasoning: Sequence[Marks]) -> bool:
    """Return whether a target is EOS without any text; marks of reasoning and spaces are no text."""
    rest = target
    for mark in (eos, *chain.from_iterable(reasoning)):
        rest = rest.replace(mark, "")
    return eos in target and not rest.strip()


def _nothing_to_train_on(document: Document, reason: str) -> BadData:
    return BadData.with_reason(reason, f"{document.where}: {reason}", "nothing to train on")


def group_into_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group consecutive documents into batches of about a million characters."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += _characters(document)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(document: Document) -> int:
    content = document.content
    return len(content) if isinstance(content, str) else sum(map(len, document_texts(document)))


def _text_bytes(document: Document) -> int:
    return sum(len(text.encode()) for text in document_texts(document))
