"""Decides which documents are removed: contaminated, exact duplicate, near duplicate; the first of a group stays.

Shards keep every document, because the decision depends on all files of a dataset, but a shard depends on one chunk
only. The decision is a file beside the shards, <root>/filtered-<hash>/<split>.npy, that readers apply
(longhaul.data.shards.filtered_out_table).
Of duplicate documents, the first in the order of the sources stays.
D = documents of the dataset; filtering takes about 60 bytes of memory for each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from longhaul.artifacts.artifact_schemas import DataManifest, Split
from longhaul.artifacts.atomic_files import content_hash, file_sha256, write_text
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.data.filters.chunk_fingerprints import BANDS_FILE, KEYS_FILE, MATCHES_FILE, EvaluationMatch, TextFilters
from longhaul.data.shards.chunks import Chunk
from longhaul.data.shards.filtered_out_table import filter_table, write_filter_table
from longhaul.data.shards.shard_reader import ShardReader, SplitReader
from longhaul.data.shards.unigram_entropy import unigram_entropy
from longhaul.data.shards.write_chunk import SPLITS, EncodingTask, read_document_keys
from longhaul.errors import InputError

REASONS = ("contaminated", "exact duplicate", "near duplicate")
_CONTAMINATED, _EXACT, _NEAR = 1, 2, 3


@dataclass(frozen=True)
class FilterDecisions:
    """The decision for each document: whether it stays, and why not.

    keys:    [D] uint64, document keys in the order of the sources.
    reasons: [D] uint8, 0 = stays, otherwise 1 + index into REASONS.
    matches: documents that contain evaluation texts.
    """

    keys: np.ndarray
    reasons: np.ndarray
    matches: list[EvaluationMatch]

    def counts(self) -> dict[str, int]:
        """Return the number of filtered documents by reason, without zeros."""
        counts = np.bincount(self.reasons, minlength=1 + len(REASONS))[1:]
        return {name: int(count) for name, count in zip(REASONS, counts, strict=True) if count}


def filter_documents(
    manifest: DataManifest, task: EncodingTask, chunks: Sequence[Chunk], filters: TextFilters
) -> DataManifest:
    """Return the manifest without filtered documents; the same manifest where the dataset sets no filter.

    Raises:
        UserError: no document stays.
    """
    if not filters.need_texts and task.dataset.deduplicate == "none":
        return manifest
    decisions = decide_documents(task, chunks, filters)
    if decisions.reasons.all():
        raise InputError(
            f"dataset {manifest.dataset}: no document stays ({decisions.counts()})",
            "add documents that are not in the evaluation files, or remove decontaminate",
        )
    data_hash = content_hash([manifest.hash, task.dataset.deduplicate, filters.settings])
    folder = task.root / f"filtered-{data_hash}"
    if decisions.matches:
        lines = (json.dumps(match._asdict(), ensure_ascii=False) + "\n" for match in decisions.matches)
        write_text(folder / "contaminated.jsonl", "".join(lines))
    is_validation = decisions.keys < np.uint64(task.threshold)
    splits = {}
    for split, selected in zip(SPLITS, (~is_validation, is_validation), strict=True):
        splits[split] = _filter_split(manifest, split, decisions.reasons[selected] > 0, folder)
    skipped = {**manifest.skipped, **decisions.counts()}
    return replace(
        manifest,
        splits=splits,
        skipped=dict(sorted(skipped.items())),
        hash=data_hash,
        unigram_entropy_nats=unigram_entropy(SplitReader(task.root, splits["train"], manifest.kind == "chat")),
    )


def decide_documents(task: EncodingTask, chunks: Sequence[Chunk], filters: TextFilters) -> FilterDecisions:
    """Decide for each document: evaluation texts first, then exact duplicates of what stays, then near duplicates."""
    root = task.root
    keys = np.concatenate([read_document_keys(root / chunk.name) for chunk in chunks])
    reasons = np.zeros(len(keys), dtype=np.uint8)
    matches: list[EvaluationMatch] = []
    if filters.decontaminate:
        files = [filters.folder(chunk, task) / MATCHES_FILE for chunk in chunks]
        matches = [match for file in files for match in _evaluation_matches(file)]
        reasons[np.isin(keys, np.array([match.key for match in matches], np.uint64))] = _CONTAMINATED
    if task.dataset.deduplicate != "none":
        staying = np.flatnonzero(reasons == 0)
        _, first = np.unique(keys[staying], return_index=True)
        reasons[np.delete(staying, first)] = _EXACT
    if filters.near_duplicates:
        staying = np.flatnonzero(reasons == 0)
        labels = label_near_duplicates(_band_readers(task, chunks, filters, staying), len(staying))
        reasons[staying[labels != np.arange(len(staying))]] = _NEAR
    return FilterDecisions(keys, reasons, matches)


def _band_readers(
    task: EncodingTask, chunks: Sequence[Chunk], filters: TextFilters, staying: np.ndarray
) -> list[Callable[[], np.ndarray]]:
    """Return one function for each band that reads its hashes [len(staying)], so that memory holds one band at a time."""
    folders = [(task.root / chunk.name, filters.folder(chunk, task)) for chunk in chunks]

    def read(band: int) -> np.ndarray:
        return np.concatenate([_read_band(chunk, fingerprints, band) for chunk, fingerprints in folders])[staying]

    bands = np.load(folders[0][1] / BANDS_FILE, mmap_mode="r")
    return [lambda band=band: read(band) for band in range(bands.shape[1])]


def _read_band(chunk: Path, fingerprints: Path, band: int) -> np.ndarray:
    """Return one band of the documents in a chunk's shards, in order.

    The fingerprints also contain documents that are not in the shards, because they cannot be trained on.
    """
    keys = np.load(fingerprints / KEYS_FILE)
    order = np.argsort(keys, kind="stable")
    positions = order[np.searchsorted(keys, read_document_keys(chunk), sorter=order)]
    return np.load(fingerprints / BANDS_FILE, mmap_mode="r")[:, band][positions]


def _evaluation_matches(file: Path) -> list[EvaluationMatch]:
    return read_typed_json(file, list[EvaluationMatch], f"delete the folder {file.parent} and run again")


def label_near_duplicates(bands: Sequence[Callable[[], np.ndarray]], count: int) -> np.ndarray:
    """Return [count] int64: for each document the first document of its group, which may be itself.

    Documents that share a band are in one group (single linkage). Each step lowers labels to the lowest label among the
    documents that share a band, until nothing changes. The result does not depend on the order of work.
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


def _filter_split(manifest: DataManifest, split: str, is_filtered: np.ndarray, folder: Path) -> Split:
    """Write the split's table of filtered documents; return the split's entry in the manifest."""
    entry, root, is_chat = manifest.splits[split], Path(manifest.path), manifest.kind == "chat"
    if not is_filtered.any():
        return entry
    lengths, filtered_loss_tokens, document = [], 0, 0
    for shard in entry["shards"]:
        reader = ShardReader(root / shard["prefix"], is_chat)
        of_shard = is_filtered[document : document + len(reader.lengths)]
        tokens = np.repeat(of_shard, reader.lengths)
        filtered_loss_tokens += int(tokens.sum() if reader.mask is None else reader.mask[tokens].sum())
        lengths.append(reader.lengths)
        document += len(reader.lengths)
    table = filter_table(np.concatenate(lengths), is_filtered)
    write_filter_table(folder / f"{split}.npy", table)
    return {
        **entry,
        "filtered_out": f"{folder.name}/{split}.npy",
        "filtered_out_sha256": file_sha256(folder / f"{split}.npy"),
        "documents": entry["documents"] - table.shape[1],
        "tokens": entry["tokens"] - int(table[2, -1]),
        "loss_tokens": entry["loss_tokens"] - filtered_loss_tokens,
    }
