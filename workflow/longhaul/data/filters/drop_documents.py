"""Which documents of a dataset are passed over: duplicates, and those that hold a stretch of an evaluation text.

Shards keep every document: what is passed over depends on all files of a dataset, and shards on one unit alone. The
answer is a file beside them, <root>/dropped-<hash>/<split>.npy, that readers honour (data.shards.indexed_dataset.Dropped).
Of alike documents the first in the order of the sources stays. D = documents of the dataset; some 60 bytes of memory each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from longhaul.artifacts.files import atomic_path, content_hash, write_text
from longhaul.artifacts.schemas import DataManifest
from longhaul.data.filters.fingerprints import BANDS, HITS, KEYS, Hit, Scan
from longhaul.data.shards.chunks import Unit
from longhaul.data.shards.indexed_dataset import ShardReader, SplitReader
from longhaul.data.shards.unigram_entropy import unigram_entropy
from longhaul.data.shards.write_chunk import SPLITS, Task, read_keys
from longhaul.errors import UserError

REASONS = ("contaminated", "exact duplicate", "near duplicate")
_CONTAMINATED, _EXACT, _NEAR = 1, 2, 3


@dataclass(frozen=True)
class Verdict:
    """keys [D] uint64 in the order of the sources; reason [D] uint8: 0 stays, else 1 + index into REASONS."""

    keys: np.ndarray
    reason: np.ndarray
    hits: list[Hit]

    def counts(self) -> dict[str, int]:
        """Documents by reason, those that occur."""
        counts = np.bincount(self.reason, minlength=1 + len(REASONS))[1:]
        return {name: int(count) for name, count in zip(REASONS, counts, strict=True) if count}


def screen(manifest: DataManifest, task: Task, units: Sequence[Unit], scan: Scan) -> DataManifest:
    """The manifest without what the dataset has passed over, if anything. UserError when no document stays."""
    if not scan.is_needed and task.dataset.deduplicate == "none":
        return manifest
    verdict = judge(task, units, scan)
    if verdict.reason.all():
        raise UserError(
            f"dataset {manifest.dataset}: no document stays ({verdict.counts()})",
            "look at deduplicate and decontaminate",
        )
    named = f"dropped-{content_hash([manifest.hash, task.dataset.deduplicate, scan.settings])}"
    folder = task.root / named
    if verdict.hits:
        lines = (json.dumps(hit._asdict(), ensure_ascii=False) + "\n" for hit in verdict.hits)
        write_text(folder / "contaminated.jsonl", "".join(lines))
    is_validation = verdict.keys < np.uint64(task.threshold)
    splits = {}
    for split, chosen in zip(SPLITS, (~is_validation, is_validation), strict=True):
        passed_over = verdict.reason[chosen] > 0
        splits[split] = _drop(manifest, split, passed_over, folder)
    skipped = {**manifest.skipped, **verdict.counts()}
    return replace(
        manifest,
        splits=splits,
        skipped=dict(sorted(skipped.items())),
        hash=named.split("-")[1],
        unigram_entropy_nats=unigram_entropy(SplitReader(task.root, splits["train"], manifest.kind == "chat")),
    )


def judge(task: Task, units: Sequence[Unit], scan: Scan) -> Verdict:
    """Evaluation texts first, then exact duplicates among what stays, then near ones."""
    root = task.root
    keys = np.concatenate([read_keys(root / unit.name) for unit in units])
    reason = np.zeros(len(keys), dtype=np.uint8)
    hits: list[Hit] = []
    if scan.decontaminate:
        found = [json.loads((root / scan.name(unit, task) / HITS).read_text(encoding="utf-8")) for unit in units]
        hits = [Hit(*hit) for of_unit in found for hit in of_unit]
        reason[np.isin(keys, np.array([hit.key for hit in hits], np.uint64))] = _CONTAMINATED
    if task.dataset.deduplicate != "none":
        staying = np.flatnonzero(reason == 0)
        _, first = np.unique(keys[staying], return_index=True)
        reason[np.delete(staying, first)] = _EXACT
    if scan.near:
        staying = np.flatnonzero(reason == 0)
        labels = first_alike(_bands(task, units, scan, staying), len(staying))
        reason[staying[labels != np.arange(len(staying))]] = _NEAR
    return Verdict(keys, reason, hits)


def _bands(task: Task, units: Sequence[Unit], scan: Scan, staying: np.ndarray) -> list[Callable[[], np.ndarray]]:
    """For each band, what reads its hashes [len(staying)]; one band is in memory at a time."""
    folders = [(task.root / unit.name, task.root / scan.name(unit, task)) for unit in units]

    def read(band: int) -> np.ndarray:
        return np.concatenate([_band_of(unit, scanned, band) for unit, scanned in folders])[staying]

    with_bands = np.load(folders[0][1] / BANDS, mmap_mode="r")
    return [lambda band=band: read(band) for band in range(with_bands.shape[1])]


def _band_of(unit: Path, scanned: Path, band: int) -> np.ndarray:
    """Of the unit's documents in order; the scan also has those that could not be trained on."""
    keys = np.load(scanned / KEYS)
    order = np.argsort(keys, kind="stable")
    places = order[np.searchsorted(keys, read_keys(unit), sorter=order)]
    return np.load(scanned / BANDS, mmap_mode="r")[:, band][places]


def first_alike(bands: Sequence[Callable[[], np.ndarray]], count: int) -> np.ndarray:
    """[count] int64: the first document that each one is alike, itself if there is none before it.

    Documents that share a band are alike, and so are those alike a third (single linkage). Labels only fall, to the lowest
    of a group that shares a band, until all bands agree: the result depends on no order of work.
    """
    labels = np.arange(count)
    while True:
        before = labels.copy()
        for read in bands:
            hashes = read()
            order = np.argsort(hashes, kind="stable")
            starts = np.flatnonzero(np.r_[True, np.diff(hashes[order]) != 0])[: len(order)]
            lowest = np.minimum.reduceat(labels[order], starts) if count else labels
            labels[order] = np.repeat(lowest, np.diff(np.r_[starts, len(order)]))
        if np.array_equal(labels, before):
            return labels


def _drop(manifest: DataManifest, split: str, passed_over: np.ndarray, folder: Path) -> dict[str, Any]:
    """Writes the split's file; returns its entry in the manifest."""
    entry, root, is_chat = manifest.splits[split], Path(manifest.path), manifest.kind == "chat"
    if not passed_over.any():
        return entry
    lengths, loss_tokens, document = [], 0, 0
    for shard in entry["shards"]:
        reader = ShardReader(root / shard["prefix"], is_chat)
        gone = passed_over[document : document + len(reader.lengths)]
        of_tokens = np.repeat(gone, reader.lengths)
        loss_tokens += int(of_tokens.sum() if reader.mask is None else reader.mask[of_tokens].sum())
        lengths.append(reader.lengths)
        document += len(reader.lengths)
    table = dropped_table(np.concatenate(lengths), passed_over)
    with atomic_path(folder / f"{split}.npy") as temporary, temporary.open("wb") as stream:
        np.save(stream, table)
    return {
        **entry,
        "dropped": f"{folder.name}/{split}.npy",
        "documents": entry["documents"] - table.shape[1],
        "tokens": entry["tokens"] - int(table[2, -1]),
        "loss_tokens": entry["loss_tokens"] - loss_tokens,
    }


def dropped_table(lengths: np.ndarray, passed_over: np.ndarray) -> np.ndarray:
    """[3, X] int64, for each document passed over: documents and tokens that stay before it, tokens dropped up to its end."""
    numbers = np.flatnonzero(passed_over)
    ends = np.cumsum(lengths, dtype=np.int64)[numbers]
    gone = np.cumsum(lengths[numbers], dtype=np.int64)
    return np.stack([numbers - np.arange(len(numbers)), ends - gone, gone])
