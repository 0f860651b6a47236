"""Totals of packed conversations (pack-*.json): documents (cut, dropped), and the shares of padding and of cut loss tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired

from longhaul.artifacts.artifact_schemas import Count, KeptConversations
from longhaul.artifacts.typed_json import Sha256, read_typed_json


class PackTotals(KeptConversations):
    """The JSON file beside a pack file: pack-*-<split>-*.json. sha256: of the pack file."""

    packs: Count
    padding_share: float
    sha256: NotRequired[Sha256]


def recorded_packs(folder: Path) -> dict[Path, Sha256]:
    """Return the pack files of a folder with their recorded hashes; older releases recorded none.

    Raises:
        UserError: a record cannot be read.
    """
    records = {path: read_typed_json(path, PackTotals, delete_packs_hint(path)) for path in folder.glob("pack-*.json")}
    return {path.with_suffix(".bin"): totals["sha256"] for path, totals in records.items() if "sha256" in totals}


def delete_packs_hint(path: Path) -> str:
    """Return the remedy for a damaged pack file or its record."""
    return f"delete {path.with_suffix('.json')} and {path}; both are written again"


def padding_share(tokens: int, positions: int) -> float:
    """Return the share of positions without a token; 0 where there is no position."""
    return 1 - tokens / positions if positions else 0.0


def share_of_padding(packs: Sequence[PackTotals]) -> float | None:
    """Return the padding of an epoch of all these packs; None where nothing is packed."""
    positions = sum(pack["packs"] * pack["sequence_length"] for pack in packs)
    return padding_share(sum(pack["tokens"] for pack in packs), positions) if positions else None


def cut_loss_share(counts: Sequence[KeptConversations]) -> float | None:
    """Return the share of the loss tokens that no sequence keeps; None where nothing is counted, or an older release did it."""
    total = sum(kept.get("loss_tokens", 0) for kept in counts)
    return sum(kept.get("cut_loss_tokens", 0) for kept in counts) / total if total else None


def left_out_share(counts: Sequence[KeptConversations]) -> float | None:
    """Return the share of the conversations that are in no sequence; None where nothing, or an older release, counted them."""
    counted = [kept for kept in counts if "dropped_documents" in kept]
    left_out = sum(kept.get("dropped_documents", 0) + kept.get("documents_without_loss", 0) for kept in counted)
    total = sum(kept["documents"] for kept in counted) + left_out
    return left_out / total if total else None
