"""Totals of packed conversations (pack-*.json): documents (cut, dropped), and the shares of padding and of cut loss tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired

from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Count
from longhaul.artifacts.typed_json import Sha256


class PackTotals(TypedDict):
    """The JSON file beside a pack file: pack-*-<split>-*.json.

    documents:              conversations in packs
    tokens:                 their tokens in the packs
    cut_documents:          those of which a part is in no pack
    dropped_documents:      conversations left out because they are longer than a sequence (truncate: drop)
    documents_without_loss: conversations left out because what a sequence keeps of them holds no loss token
    loss_tokens:            loss tokens of the split
    cut_loss_tokens:        those in no pack
    sha256:                 of the pack file
    """

    documents: Count
    packs: Count
    sequence_length: Count
    tokens: Count
    cut_documents: Count
    dropped_documents: NotRequired[Count]
    documents_without_loss: NotRequired[Count]
    loss_tokens: NotRequired[Count]
    cut_loss_tokens: NotRequired[Count]
    padding_share: float
    sha256: NotRequired[Sha256]


def padding_share(tokens: int, positions: int) -> float:
    """Return the share of positions without a token; 0 where there is no position."""
    return 1 - tokens / positions if positions else 0.0


def share_of_padding(packs: Sequence[PackTotals]) -> float | None:
    """Return the padding of an epoch of all these packs; None where nothing is packed."""
    positions = sum(pack["packs"] * pack["sequence_length"] for pack in packs)
    return padding_share(sum(pack["tokens"] for pack in packs), positions) if positions else None


def cut_loss_share(packs: Sequence[PackTotals]) -> float | None:
    """Return the share of the loss tokens that no pack holds; None where nothing is packed, or an older release did it."""
    total = sum(pack.get("loss_tokens", 0) for pack in packs)
    return sum(pack.get("cut_loss_tokens", 0) for pack in packs) / total if total else None
