"""One dataset -> token shards in <job.folder>/<unit>/, and the manifest that names them in the order of the sources.

The sources are cut into units (longhaul.data.shards.chunks) that a pool of processes makes; finished units are found again, so a
killed job goes on, and a new file is encoded alone. No byte depends on the number of workers or on who made which unit.

Where several jobs share a dataset's units, one surveys its sources, each of the others makes its share, and the last one,
which writes the manifest, finds them all there; it makes what is missing.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from longhaul.artifacts.files import content_hash
from longhaul.artifacts.schemas import DataManifest, EncodedPartition, TokenizerManifest
from longhaul.data.filters.drop_documents import screen
from longhaul.data.filters.fingerprints import Scan
from longhaul.data.readers.documents import no_documents
from longhaul.data.sampling import mixtures as mixing
from longhaul.data.shards.chunks import Source, Unit, share_of
from longhaul.data.shards.indexed_dataset import ShardReader, SplitReader, token_dtype
from longhaul.data.shards.source_index import Corpus
from longhaul.data.shards.unigram_entropy import unigram_entropy
from longhaul.data.shards.worker_pool import Makers, aside, hashed, worker_count
from longhaul.data.shards.write_chunk import SPLITS, Task, read_record, remove_leftovers
from longhaul.data.tokenizers.choose_encoder import Choice, hard_ids, load_fast, load_reference
from longhaul.data.tokenizers.encoders import Rows
from longhaul.errors import DISK_FULL, DiskFull, UserError
from longhaul.jobs.specs import EncodeSpec, TokenizeSpec


def run(job: TokenizeSpec) -> None:
    """Makes the shards that are not there yet, then writes `job.out`.

    Raises UserError for whatever is wrong in the sources (longhaul.data.readers.documents), for a dataset that holds nothing to
    train on, and when the shards cannot be written.
    """
    if job.dataset.mixture:
        mixing.run(job)
        return
    with _at_work(job, job.name) as (corpus, scan, makers):
        made = _made(corpus, scan, makers)
        open_split_files(made, Path(job.folder))
        made.write(Path(job.out))


def survey(job: TokenizeSpec) -> None:
    """Writes to `job.out` what the jobs that share the units agree on. Raises UserError as `run` does."""
    with _at_work(job, job.name) as (corpus, _, _):
        corpus.as_survey().write(Path(job.out))


def encode(job: EncodeSpec) -> None:
    """Makes the units of the job's share, then writes `job.out`. Raises UserError as `run` does."""
    chosen = partial(share_of, share=job.share, shares=job.shares)
    with _at_work(job, f"{job.name} {job.share}/{job.shares}", job.shares) as (corpus, scan, makers):
        task, units, choice = makers.make(corpus, corpus.threshold, chosen)
        makers.scan(task, units, scan)
        EncodedPartition(job.share, job.shares, choice._asdict(), [unit.name for unit in units]).write(Path(job.out))


@contextmanager
def _at_work(job: TokenizeSpec, name: str, shares: int = 1) -> Iterator[tuple[Corpus, Scan, Makers]]:
    """What a job works on and with; a UserError for what is wrong before it begins, and for a disk that fails it."""
    tokenizer = TokenizerManifest.read(Path(job.tokenizer))
    if job.dataset.kind == "chat" and not tokenizer.has_chat_template:
        raise UserError(f"dataset {job.name}: the tokenizer has no chat template", "set tokenizer.chat_template")
    if not job.files:
        raise UserError("the dataset has no files", "check its `files`, or run `longhaul fetch` first")
    scan = Scan.of(job.dataset, job.evaluation)  # before a pool is forked: its processes share the evaluation texts
    size = sum(Path(file).stat().st_size for file in job.files if Path(file).exists())
    workers = worker_count(size // shares, job.workers)
    sources, hard = _begun(job, Path(tokenizer.path), workers)
    with Makers.start(name, workers) as makers:
        try:
            if job.survey:
                corpus = Corpus.surveyed(job, tokenizer, Path(job.survey))
            else:
                corpus = Corpus.survey(job, tokenizer, sources, hard, makers.parts, makers.each)
            corpus.root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(corpus.root)
            yield corpus, scan, makers
        except OSError as error:
            raise _unwritten(error, job) from None


def _begun(job: TokenizeSpec, tokenizer: Path, workers: int) -> tuple[tuple[Source, ...], tuple[Rows, ...]]:
    """Loads both encoders, which makers that are forked later share; other processes hash the sources meanwhile, and
    encode hard texts with the reference. Sources and ids; none for a job that finds them surveyed.
    """
    with hashed(() if job.survey else job.files, job.dataset.format, workers) as hashing:
        load_reference(tokenizer)
        with aside(workers if workers > 1 and not job.survey else 0) as each:
            hard = () if job.survey else hard_ids(tokenizer, workers, each)
            load_fast(tokenizer)
            return tuple(hashing), tuple(hard)


def _unwritten(error: OSError, job: TokenizeSpec) -> UserError:
    """What a file system that refuses the shards means for the user."""
    what, place, choices = f"writing dataset {job.name}", Path(job.folder), "choose another place with storage.data"
    if error.errno in DISK_FULL:
        there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        return DiskFull(what, place, 0, shutil.disk_usage(there).free, choices)
    return UserError(f"{what} to {place}: {error}", f"let this user write there, or {choices}")


def open_split_files(manifest: DataManifest, folder: Path) -> None:
    """UserError unless every shard is there and as long as its index says."""
    for split in manifest.splits.values():
        for shard in split["shards"]:
            ShardReader(folder / shard["prefix"], with_mask=manifest.kind == "chat")


def _made(corpus: Corpus, scan: Scan, makers: Makers) -> DataManifest:
    """All units; once more when the split left one side empty."""
    threshold = corpus.threshold
    for _ in range(2):
        task, units, choice = makers.make(corpus, threshold)
        records = [read_record(task.root / unit.name) for unit in units]
        settled = _settle(threshold, records)
        if settled == threshold:
            makers.scan(task, units, scan)
            return screen(_manifest(corpus, task, units, records, choice), task, units, scan)
        threshold = settled
    raise AssertionError("a threshold settles at once")


def _settle(threshold: int, records: list[dict[str, Any]]) -> int:
    """Keys below the result are validation: at least the lowest one, never the highest one.

    Documents that are all alike stay in training: they cannot be told apart.
    """
    lowest, highest = min(r["lowest_key"] for r in records), max(r["highest_key"] for r in records)
    if threshold == 0 or lowest == highest or highest < 0:
        return 0 if lowest == highest else threshold
    return min(max(threshold, lowest + 1), highest)


def _manifest(
    corpus: Corpus, task: Task, units: Sequence[Unit], records: Sequence[dict[str, Any]], choice: Choice
) -> DataManifest:
    job, skipped = corpus.job, Counter[str]()
    for record in records:
        skipped.update(record["skipped"])
    documents = [0] * len(corpus.sources)
    for unit, record in zip(units, records, strict=True):
        for piece, count in zip(unit.pieces, record["documents"], strict=True):
            documents[piece.file] += count
    _require_documents(job, documents, records, skipped)
    settings = corpus.settings("", task.threshold)
    splits = {split: _split(split, units, records) for split in SPLITS}
    return DataManifest(
        dataset=job.name,
        kind=job.dataset.kind,
        path=job.folder,
        hash=content_hash([settings, [source.sha256 for source in corpus.sources]]),
        tokenizer_hash=task.tokenizer.hash,
        dtype=token_dtype(task.tokenizer.vocab_size),
        splits=splits,
        sources=[
            {"path": source.path, "bytes": source.bytes, "sha256": source.sha256, "documents": count}
            for source, count in zip(corpus.sources, documents, strict=True)
        ],
        skipped=dict(sorted(skipped.items())),
        unigram_entropy_nats=unigram_entropy(SplitReader(task.root, splits["train"], job.dataset.kind == "chat")),
        encoder=choice._asdict(),
    )


def _require_documents(
    job: TokenizeSpec, documents: list[int], records: Sequence[dict[str, Any]], skipped: Counter[str]
) -> None:
    for file, count in zip(job.files, documents, strict=True):
        if not count and job.dataset.bad_rows == "stop":
            raise no_documents(file)
    if max(record["highest_key"] for record in records) < 0:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in skipped.items())
        raise UserError(f"dataset {job.name}: no document can be trained on ({reasons})", "check its files and columns")


def _split(split: str, units: Sequence[Unit], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A split's entry of the data manifest: the shards of all units in order, and their sums."""
    entries = [record["splits"][split] for record in records]
    named = [
        {**shard, "prefix": f"{unit.name}/{shard['prefix']}"}
        for unit, entry in zip(units, entries, strict=True)
        for shard in entry["shards"]
    ]
    totals = {key: sum(entry[key] for entry in entries) for key in ("tokens", "documents", "loss_tokens")}
    return {"shards": named, **totals}
