"""One dataset -> token shards in <job.folder>/<hash>, and the manifest that points to them.

The hash is made of the source files' contents, the tokenizer and the dataset's settings: unchanged sources find their
finished shards again, a changed source gets a new folder and the old one stays.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from longhaul.artifacts import DataManifest, TokenizerManifest, content_hash, file_sha256
from longhaul.data.encoding import Encoded, batches, encode_all
from longhaul.data.formats import format_of
from longhaul.data.indexed import ShardReader, SplitWriter, token_dtype
from longhaul.data.progress import Progress
from longhaul.data.readers import Document, read_documents
from longhaul.errors import UserError
from longhaul.jobs import TokenizeJob

_LAYOUT_VERSION = 1
_MANIFEST = "manifest.json"
_BYTES_PER_WORKER = 2_000_000  # less than this is encoded sooner than a worker starts


def run(job: TokenizeJob) -> None:
    """Makes the shards, or finds finished ones, then writes `job.out`.

    Raises UserError for whatever is wrong in the sources (longhaul.data.readers), for a dataset that holds nothing to
    train on, and when the shards cannot be written.
    """
    tokenizer = TokenizerManifest.read(Path(job.tokenizer))
    if job.dataset.kind == "chat" and not tokenizer.has_chat_template:
        raise UserError(f"dataset {job.name}: the tokenizer has no chat template", "set tokenizer.chat_template")
    sources = [_source(file) for file in job.files]
    digest = _identity(job, tokenizer, sources)
    folder = Path(job.folder) / digest
    if not (folder / _MANIFEST).is_file():
        _make(job, tokenizer, sources, folder)
    made = DataManifest.read(folder / _MANIFEST)
    open_split_files(made, folder)
    # The same bytes may have moved since the shards were made.
    moved = [{**old, "path": new["path"]} for old, new in zip(made.sources, sources, strict=True)]
    dataclasses.replace(made, path=str(folder), sources=moved).write(Path(job.out))


def open_split_files(manifest: DataManifest, folder: Path) -> None:
    """UserError unless every shard is there and as long as its index says."""
    for split in manifest.splits.values():
        for shard in split["shards"]:
            ShardReader(folder / shard["prefix"], with_mask=manifest.kind == "chat")


def _source(file: str) -> dict[str, Any]:
    path = Path(file)
    try:
        return {"path": file, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", "check the dataset's `files`") from None


def _identity(job: TokenizeJob, tokenizer: TokenizerManifest, sources: list[dict[str, Any]]) -> str:
    dataset = job.dataset
    chosen = dataset.format
    return content_hash(
        {
            "version": _LAYOUT_VERSION,
            "kind": dataset.kind,
            "column": dataset.columns.messages if dataset.kind == "chat" else dataset.columns.text,
            "formats": [format_of(Path(file)) if chosen == "auto" else chosen for file in job.files],
            "validation_share": dataset.validation_share,
            "sources": [source["sha256"] for source in sources],
            "tokenizer": tokenizer.hash,
        }
    )


def _make(job: TokenizeJob, tokenizer: TokenizerManifest, sources: list[dict[str, Any]], folder: Path) -> None:
    """Writes the folder beside its final place and renames it when all is on disk."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            made = Path(temporary) / "shards"
            _manifest(job, tokenizer, sources, folder, _fill(job, tokenizer, sources, made)).write(made / _MANIFEST)
            made.replace(folder)
    except OSError as error:
        raise UserError(
            f"cannot write the shards of dataset {job.name} to {folder}: {error.strerror}",
            "free space or quota there, or choose another place with storage.data",
        ) from None


def _fill(job: TokenizeJob, tokenizer: TokenizerManifest, sources: list[dict[str, Any]], made: Path) -> _Filled:
    """Writes all shards; a second time when the split by hash left one side without a document."""
    nominal = int(job.dataset.validation_share * 2**64)
    filled = _write(job, tokenizer, sources, made, nominal)
    settled = _settle(nominal, filled.lowest_key, filled.highest_key)
    if settled != nominal:
        shutil.rmtree(made)
        filled = _write(job, tokenizer, sources, made, settled)
    return filled


def _settle(threshold: int, lowest: int, highest: int) -> int:
    """Keys below the result are validation: at least the lowest one, never the highest one.

    Documents that are all alike stay in training: they cannot be told apart.
    """
    if threshold == 0 or lowest == highest:
        return 0
    return min(max(threshold, lowest + 1), highest)


@dataclass
class _Filled:
    """What a pass over the sources gave."""

    documents_per_file: list[int]
    token_counts: np.ndarray  # [vocabulary] int64: tokens in the training loss
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    lowest_key: int = 2**64
    highest_key: int = -1


def _write(
    job: TokenizeJob, tokenizer: TokenizerManifest, sources: list[dict[str, Any]], folder: Path, threshold: int
) -> _Filled:
    folder.mkdir()
    dtype, is_chat = token_dtype(tokenizer.vocab_size), job.dataset.kind == "chat"
    writers = {split: SplitWriter(folder, split, dtype, is_chat) for split in ("train", "validation")}
    filled = _Filled([0] * len(job.files), np.zeros(tokenizer.vocab_size, dtype=np.int64))
    progress = Progress(job.name, [source["bytes"] for source in sources])
    workers = max(1, min(job.workers, progress.total_bytes // _BYTES_PER_WORKER))
    documents = _counted(read_documents(job.files, job.dataset), filled)
    for batch, encoded in encode_all(batches(documents), tokenizer, job.dataset.kind, workers):
        _add(encoded, writers, filled, threshold)
        last = batch.documents[-1]
        progress.add(len(batch.documents), len(encoded.tokens), last.file_index, last.read_share)
    progress.finish()
    filled.splits = {split: writer.close() for split, writer in writers.items()}
    if filled.highest_key < 0:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in filled.skipped.items())
        raise UserError(f"dataset {job.name}: no document can be trained on ({reasons})", "check its files and columns")
    return filled


def _counted(documents: Iterator[Document], filled: _Filled) -> Iterator[Document]:
    for document in documents:
        filled.documents_per_file[document.file_index] += 1
        yield document


def _add(encoded: Encoded, writers: dict[str, SplitWriter], filled: _Filled, threshold: int) -> None:
    filled.skipped.update(encoded.skipped)
    if not len(encoded.keys):
        return
    filled.lowest_key = min(filled.lowest_key, int(encoded.keys.min()))
    filled.highest_key = max(filled.highest_key, int(encoded.keys.max()))
    is_validation = encoded.keys < np.uint64(threshold)
    for split, chosen in (("train", ~is_validation), ("validation", is_validation)):
        of_tokens = np.repeat(chosen, encoded.lengths)
        tokens = encoded.tokens[of_tokens]
        mask = None if encoded.mask is None else encoded.mask[of_tokens]
        writers[split].add(tokens, encoded.lengths[chosen], mask)
        if split == "train":
            in_loss = tokens if mask is None else tokens[mask == 1]
            filled.token_counts += np.bincount(in_loss, minlength=len(filled.token_counts))


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy, in nats, of tokens drawn with these frequencies [vocabulary]: the loss of a model that only counts."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())


def _manifest(
    job: TokenizeJob, tokenizer: TokenizerManifest, sources: list[dict[str, Any]], folder: Path, filled: _Filled
) -> DataManifest:
    counted = zip(sources, filled.documents_per_file, strict=True)
    return DataManifest(
        dataset=job.name,
        kind=job.dataset.kind,
        path=str(folder),
        hash=folder.name,
        tokenizer_hash=tokenizer.hash,
        dtype=token_dtype(tokenizer.vocab_size),
        splits=filled.splits,
        sources=[{**source, "documents": documents} for source, documents in counted],
        skipped=dict(sorted(filled.skipped.items())),
        unigram_entropy_nats=unigram_entropy(filled.token_counts),
    )
