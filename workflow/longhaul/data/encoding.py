"""Documents -> token ids, loss masks and split keys, in this process or in a pool; the order is always the documents'.

A worker loads the tokenizer from its folder with `tokenizers` alone: no torch, no GPU, about 60 MB.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longhaul.artifacts import TokenizerManifest, canonical_json
from longhaul.data.chat import ChatTemplate, Span
from longhaul.data.indexed import token_dtype
from longhaul.data.readers import Document
from longhaul.errors import UserError

_BATCH_CHARACTERS = 1 << 19
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Encoded:
    """One batch of D documents with N tokens in all.

    tokens [N] uint16 or int32, lengths [D] int32, mask [N] uint8 for chats, keys [D] uint64 (document hashes),
    skipped: reason -> documents of the batch that were left out.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray | None
    keys: np.ndarray
    skipped: Counter[str]


@dataclass(frozen=True)
class Batch:
    """What a worker gets, and the last document's place for progress."""

    documents: list[Document]
    characters: int


class Encoder:
    """Turns batches into ids with one thread."""

    def __init__(self, manifest: TokenizerManifest, kind: str) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(Path(manifest.path) / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._eos_id = manifest.eos_id
        self._dtype = np.dtype(token_dtype(manifest.vocab_size))
        self._template = ChatTemplate.load(Path(manifest.path)) if kind == "chat" else None

    def encode(self, documents: Sequence[Document]) -> Encoded:
        """Ids of each document; UserError (with file and line) for a conversation that cannot be rendered."""
        if self._template is None:
            kept, skipped = _without(documents, "empty text", lambda document: not document.content)
            ids, masks = self._texts(kept), None
        else:
            kept, skipped = _without(documents, "no assistant turn", _has_no_answer)
            ids, masks = self._chats(self._template, kept)
        return Encoded(
            tokens=np.concatenate([np.empty(0, self._dtype), *ids]),
            lengths=np.array([len(row) for row in ids], dtype=np.int32),
            mask=None if masks is None else np.concatenate([np.empty(0, np.uint8), *masks]),
            keys=np.array([document_key(document) for document in kept], dtype=np.uint64),
            skipped=skipped,
        )

    def _texts(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """The tokenizer's own ids (with BOS where it adds one), then EOS."""
        texts = [str(document.content) for document in documents]
        rows = (encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts))
        return [np.array(row if row and row[-1] == self._eos_id else [*row, self._eos_id], self._dtype) for row in rows]

    def _chats(
        self, template: ChatTemplate, documents: Sequence[Document]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        rendered = [template.render(_conversation(document), document.where) for document in documents]
        encodings = self._tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        ids = [np.array(encoding.ids, self._dtype) for encoding in encodings]
        pairs = zip(encodings, rendered, strict=True)
        return ids, [_loss_mask(encoding.offsets, spans) for encoding, (_, spans) in pairs]


def _loss_mask(offsets: Sequence[tuple[int, int]], spans: list[Span]) -> np.ndarray:
    """[T] uint8: 1 where a token overlaps a stretch (in characters) that the assistant wrote."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=np.uint8)
    for start, end in spans:
        mask[(starts < end) & (ends > start)] = 1
    return mask


def document_key(document: Document) -> int:
    """64 bits of BLAKE2 of the text, or of the conversation's canonical JSON: decides the split, for any tokenizer."""
    content = document.content
    data = content if isinstance(content, str) else canonical_json(content)
    return int.from_bytes(hashlib.blake2b(data.encode(), digest_size=8).digest(), "little")


def _conversation(document: Document) -> list[dict[str, Any]]:
    assert isinstance(document.content, list)
    return document.content


def _has_no_answer(document: Document) -> bool:
    return not any(message["role"] == "assistant" for message in _conversation(document))


def _without(documents: Sequence[Document], reason: str, is_left_out: Any) -> tuple[list[Document], Counter[str]]:
    kept = [document for document in documents if not is_left_out(document)]
    left_out = len(documents) - len(kept)
    return kept, Counter({reason: left_out} if left_out else {})


def batches(documents: Iterator[Document]) -> Iterator[Batch]:
    """Consecutive documents of about half a million characters: the same batches whatever the number of workers."""
    held: list[Document] = []
    characters = 0
    for document in documents:
        held.append(document)
        characters += _size(document)
        if characters >= _BATCH_CHARACTERS or len(held) >= _BATCH_DOCUMENTS:
            yield Batch(held, characters)
            held, characters = [], 0
    if held:
        yield Batch(held, characters)


def _size(document: Document) -> int:
    content = document.content
    return len(content) if isinstance(content, str) else sum(len(message["content"]) for message in content)


def encode_all(
    work: Iterator[Batch], manifest: TokenizerManifest, kind: str, workers: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Encodes batches in `workers` processes (1: in this one); results come in the order of the batches.

    Raises UserError when a worker process dies.
    """
    if workers == 1:
        encoder = Encoder(manifest, kind)
        yield from ((batch, encoder.encode(batch.documents)) for batch in work)
        return
    # Spawned, not forked: the tokenizer's Rust threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (manifest, kind)) as pool:
        try:
            yield from _in_order(pool, work, most_waiting=2 * workers)
        except BrokenProcessPool:
            raise UserError(
                "a tokenizing process died, most often for lack of memory", "give the job more memory or fewer CPUs"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, work: Iterator[Batch], most_waiting: int) -> Iterator[tuple[Batch, Encoded]]:
    """A bounded number of batches is under way, so memory does not grow with the corpus."""
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    for batch in work:
        waiting.append((batch, pool.submit(_encode_in_worker, batch.documents)))
        if len(waiting) > most_waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


_worker: list[Encoder] = []  # of this process, filled once when a pool starts it


def _start_worker(manifest: TokenizerManifest, kind: str) -> None:
    _worker.append(Encoder(manifest, kind))


def _encode_in_worker(documents: list[Document]) -> Encoded:
    return _worker[0].encode(documents)
