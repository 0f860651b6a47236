"""Builds a dataset's manifest from the records of its chunks: totals, skipped rows, columns and keys that nothing reads."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from longhaul.artifacts.artifact_schemas import DataManifest, Shard, Split
from longhaul.artifacts.atomic_files import content_hash
from longhaul.data.readers.conversations import key_text
from longhaul.data.readers.read_documents import no_documents
from longhaul.data.shards.chunks import Chunk
from longhaul.data.shards.indexed_dataset import token_dtype
from longhaul.data.shards.shard_reader import ShardReader, SplitReader
from longhaul.data.shards.source_index import IndexedSources
from longhaul.data.shards.unigram_entropy import unigram_entropy
from longhaul.data.shards.write_chunk import SPLITS, ChunkRecord, EncodingTask
from longhaul.data.tokenizers.choose_encoder import EncoderChoice
from longhaul.errors import InputError, printable
from longhaul.jobs.kinds.tokenize_jobs import TokenizeSpec


def build_manifest(
    sources: IndexedSources,
    task: EncodingTask,
    chunks: Sequence[Chunk],
    records: Sequence[ChunkRecord],
    choice: EncoderChoice,
) -> DataManifest:
    """Return the manifest of encoded chunks, before filters.

    Raises:
        UserError: no document can be trained on, or a source has no documents and `bad_rows` is stop.
    """
    job, skipped = sources.job, Counter[str]()
    for record in records:
        skipped.update(record["skipped"])
    documents = [0] * len(sources.sources)
    for chunk, record in zip(chunks, records, strict=True):
        for source_range, count in zip(chunk.ranges, record["documents"], strict=True):
            documents[source_range.source] += count
    _require_documents(job, documents, records, skipped)
    settings = sources.settings("", task.threshold)
    splits = {split: _split_entry(split, chunks, records) for split in SPLITS}
    return DataManifest(
        dataset=job.name,
        kind=job.dataset.kind,
        path=job.folder,
        hash=content_hash([settings, [source.sha256 for source in sources.sources]]),
        tokenizer_hash=task.tokenizer.hash,
        dtype=token_dtype(task.tokenizer.vocab_size),
        splits=splits,
        sources=[
            {"path": source.path, "bytes": source.size_bytes, "sha256": source.sha256, "documents": count}
            for source, count in zip(sources.sources, documents, strict=True)
        ],
        skipped=dict(sorted(skipped.items())),
        unigram_entropy_nats=unigram_entropy(SplitReader(task.root, splits["train"], job.dataset.kind == "chat")),
        encoder=choice._asdict(),
        unread=_unread(records),
        control_texts=sum(record["control_texts"] for record in records),
    )


def _unread(records: Sequence[ChunkRecord]) -> dict[str, dict[str, int]]:
    """Return how many rows have a column, and how many messages a key, that nothing reads in any chunk."""
    columns, keys, read = Counter[str](), Counter[str](), set[str]()
    for record in records:
        columns.update(record["unread_columns"])
        keys.update({name: found["messages"] for name, found in record["message_keys"].items()})
        read.update(name for name, found in record["message_keys"].items() if found["is_read"])
    unread_keys = {name: count for name, count in sorted(keys.items()) if name not in read}
    return {"columns": dict(sorted(columns.items())), "message_keys": unread_keys}


def print_unread(manifest: DataManifest) -> None:
    """Print what the dataset contains and nothing reads."""
    found = [
        f"{what} {', '.join(f'{text(name)} ({count:,} {unit})' for name, count in manifest.unread[key].items())}"
        for key, what, unit, text in (
            ("columns", "the columns", "rows", str),
            ("message_keys", "the message keys", "messages", key_text),
        )
        if manifest.unread[key]
    ]
    if found:
        line = (
            f"dataset {manifest.dataset}: nothing reads {printable('; '.join(found))}; nothing of them reaches the text"
        )
        print(line, file=sys.stderr, flush=True)
    if manifest.control_texts:
        print(
            f"dataset {manifest.dataset}: {manifest.control_texts:,} conversations contain the text of a control token, "
            "which is encoded as plain text; allow_control_tokens: true makes it that token",
            file=sys.stderr,
            flush=True,
        )


def _require_documents(
    job: TokenizeSpec, documents: list[int], records: Sequence[ChunkRecord], skipped: Counter[str]
) -> None:
    for file, count in zip(job.files, documents, strict=True):
        if not count and job.dataset.bad_rows == "stop":
            raise no_documents(file).stopping()
    if max(record["highest_key"] for record in records) < 0:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in skipped.items())
        raise InputError(
            f"dataset {job.name}: no document can be trained on ({reasons})",
            "correct the texts of its `files`, or its `columns`",
        )


def _split_entry(split: str, chunks: Sequence[Chunk], records: Sequence[ChunkRecord]) -> Split:
    """Return a split's entry of the manifest: the shards of all chunks in order, and their totals."""
    entries: list[Split] = [record["splits"][split] for record in records]
    shards: list[Shard] = [
        {**shard, "prefix": f"{chunk.name}/{shard['prefix']}"}
        for chunk, entry in zip(chunks, entries, strict=True)
        for shard in entry["shards"]
    ]
    return sum_splits(entries, shards)


def sum_splits(entries: Sequence[Split], shards: list[Shard]) -> Split:
    """Return a split with the totals of `entries`."""
    return {
        "shards": shards,
        "tokens": sum(entry["tokens"] for entry in entries),
        "documents": sum(entry["documents"] for entry in entries),
        "loss_tokens": sum(entry["loss_tokens"] for entry in entries),
    }


def require_complete_shards(manifest: DataManifest, folder: Path) -> None:
    """Raise UserError unless every shard exists and has the size that its index gives."""
    for split in manifest.splits.values():
        for shard in split["shards"]:
            ShardReader(folder / shard["prefix"], with_mask=manifest.kind == "chat")
