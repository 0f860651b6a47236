"""Counts what sequences of one length keep of a split's conversations, and refuses a length that keeps none.

D = documents of the split, S = sequence length, T = tokens of a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from longhaul.artifacts.artifact_schemas import KeptConversations
from longhaul.config.stage_config import Truncate
from longhaul.data.shards.shard_reader import SplitReader
from longhaul.errors import InputError


class CountedConversations(NamedTuple):
    """has_loss [D] bool: of which documents a sequence keeps a loss token. lengths [D] int32: their tokens, uncut."""

    totals: KeptConversations
    has_loss: np.ndarray
    lengths: np.ndarray


def kept_tokens(count: int, length: int, truncate: Truncate) -> slice:
    """Return which of a conversation's tokens [count] are in a sequence of `length` tokens."""
    return slice(max(0, count - length), count) if truncate == "left" else slice(0, min(count, length))


def count_conversations(reader: SplitReader, length: int, truncate: Truncate) -> CountedConversations:
    """Count what sequences of `length` tokens keep of a split with documents."""
    lengths = reader.lengths()
    is_cut = lengths > length
    has_loss, cut_loss_tokens = _count_loss(reader, np.flatnonzero(is_cut), length, truncate)
    totals: KeptConversations = {
        "sequence_length": length,
        "truncate": truncate,
        "documents": int(has_loss.sum()),
        "tokens": int(np.minimum(lengths[has_loss], length).sum(dtype=np.int64)),
        "cut_documents": int(is_cut[has_loss].sum()),
        "dropped_documents": int(is_cut.sum()) if truncate == "drop" else 0,
        "documents_without_loss": 0 if truncate == "drop" else int((~has_loss).sum()),
        "loss_tokens": reader.loss_token_count,
        "cut_loss_tokens": cut_loss_tokens,
        "median_tokens": int(np.median(lengths)),
    }
    return CountedConversations(totals, has_loss, lengths)


def left_out_lines(kept: KeptConversations) -> Iterator[str]:
    """Yield lines for a log about conversations that are in no sequence."""
    length = kept["sequence_length"]
    if dropped := kept.get("dropped_documents"):
        yield f"left out {dropped:,} conversations longer than {length} tokens (truncate: drop)"
    if without := kept.get("documents_without_loss"):
        yield (
            f"left out {without:,} conversations whose {length} tokens hold no loss token: raise sequence_length, or use "
            "another truncate"
        )


def require_kept_conversations(kept: KeptConversations, truncate: Truncate, split: str, where: str) -> None:
    """Raise InputError where sequences keep no conversation of a split.

    where: stage and dataset, for the message
    """
    if kept["documents"]:
        return
    count = kept.get("dropped_documents", 0) + kept.get("documents_without_loss", 0)
    raise InputError(
        f"{where}: with truncate {truncate}, none of the {count:,} conversations of the {split} split has a loss token within "
        f"sequence_length {kept['sequence_length']}; half of them have {kept.get('median_tokens', 0):,} tokens or more",
        "raise the stage's sequence_length, use another truncate, or hold out other conversations (validation_fraction)",
    )


def _count_loss(reader: SplitReader, cut: np.ndarray, length: int, truncate: Truncate) -> tuple[np.ndarray, int]:
    """Return which documents keep a loss token in a sequence, [D] bool, and how many loss tokens no sequence keeps.

    cut: numbers of the documents longer than a sequence. Only their masks have to be read, because every whole document
    has a loss token. No position predicts the first of the kept tokens.
    """
    has_loss = np.ones(reader.document_count, dtype=bool)
    lost = 0
    for number in cut.tolist():
        mask = reader.document(number)[1]
        kept = 0 if truncate == "drop" else int(mask[kept_tokens(len(mask), length, truncate)][1:].sum())
        has_loss[number] = kept > 0
        lost += int(mask[1:].sum()) - kept
    return has_loss, lost
