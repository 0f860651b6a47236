"""One dataset -> token shards in <job.folder>/<unit>/, and the manifest that names them in the order of the sources.

The sources are cut into units (longhaul.data.units) that a pool of processes makes; finished units are found again, so a
killed job goes on, and a new file is encoded alone. No byte depends on the number of workers or on who made which unit.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longhaul.artifacts import DataManifest, TokenizerManifest, content_hash
from longhaul.data import mixing
from longhaul.data.encoders import Choice, Fast, Reference, choose, open_encoder
from longhaul.data.encoding import EncodersDisagree
from longhaul.data.indexed import ShardReader, token_dtype
from longhaul.data.progress import Counters, Progress
from longhaul.data.readers import Document, columns_of, documents_of, no_documents, texts
from longhaul.data.scan import Scan, scan_unit
from longhaul.data.screen import screen
from longhaul.data.units import Source, Unit, cut
from longhaul.data.work import RECORD, SPLITS, Task, Worker, read_record, remove_leftovers
from longhaul.errors import UserError
from longhaul.jobs import TokenizeJob

_LAYOUT_VERSION = 3
_BYTES_PER_WORKER = 2_000_000  # less than this is encoded sooner than a worker starts
_SAMPLED_UNITS, _SAMPLED_CHARACTERS = 16, 20_000
# Forked, which spares every worker a third of a second of imports. It is done before a tokenizer is loaded, and workers
# encode with one thread, so there is no thread that a child would miss.
_FORK = multiprocessing.get_context("fork")


def run(job: TokenizeJob) -> None:
    """Makes the shards that are not there yet, then writes `job.out`.

    Raises UserError for whatever is wrong in the sources (longhaul.data.readers), for a dataset that holds nothing to
    train on, and when the shards cannot be written.
    """
    if job.dataset.mixture:
        mixing.run(job)
        return
    tokenizer = TokenizerManifest.read(Path(job.tokenizer))
    if job.dataset.kind == "chat" and not tokenizer.has_chat_template:
        raise UserError(f"dataset {job.name}: the tokenizer has no chat template", "set tokenizer.chat_template")
    if not job.files:
        raise UserError("the dataset has no files", "check its `files`, or run `longhaul fetch` first")
    root, counters, scan = Path(job.folder), Counters(_FORK), Scan.of(job.dataset, job.evaluation)
    with _pool(job, Path(tokenizer.path), counters) as pool:
        sources = _sources(job)
        try:
            root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(root)
            parts, each = (job.workers, pool.map) if pool else (1, map)
            choice = choose(Path(tokenizer.path), _sample(job, sources), parts, each)
            made = _make(job, tokenizer, sources, choice, scan, _Makers(pool, counters))
        except OSError as error:
            raise UserError(
                f"cannot write the shards of dataset {job.name} to {root}: {error.strerror}",
                "free space or quota there, or choose another place with storage.data",
            ) from None
    open_split_files(made, root)
    made.write(Path(job.out))


def open_split_files(manifest: DataManifest, folder: Path) -> None:
    """UserError unless every shard is there and as long as its index says."""
    for split in manifest.splits.values():
        for shard in split["shards"]:
            ShardReader(folder / shard["prefix"], with_mask=manifest.kind == "chat")


def _sources(job: TokenizeJob) -> list[Source]:
    """Hashing releases the interpreter's lock: threads do."""
    with ThreadPoolExecutor(job.workers) as pool:
        return list(pool.map(lambda file: Source.of(file, job.dataset.format), job.files))


def _sample(job: TokenizeJob, sources: Sequence[Source]) -> list[str]:
    """Texts from units spread over the dataset."""
    units = _cut(job, sources, {})
    sample: list[str] = []
    for unit in units[:: max(1, len(units) // _SAMPLED_UNITS)]:
        documents = documents_of(unit.pieces[0].part(sources), job.dataset)
        found = next((document for document in documents if isinstance(document, Document)), None)
        sample += [text[:_SAMPLED_CHARACTERS] for text in texts(found)] if found else []
    return sample


def _cut(job: TokenizeJob, sources: Sequence[Source], settings: dict[str, Any]) -> list[Unit]:
    return cut(sources, int(job.dataset.unit_mb * 1e6), settings)


def _make(
    job: TokenizeJob,
    tokenizer: TokenizerManifest,
    sources: Sequence[Source],
    choice: Choice,
    scan: Scan,
    makers: _Makers,
) -> DataManifest:
    """All units; with the reference when an encoder was caught out, and again when the split left one side empty."""
    threshold = int(job.dataset.validation_share * 2**64)
    for _ in range(3):
        if choice.reason:
            print(f"tokenize {job.name}: encoding with tokenizers: {choice.reason}", file=sys.stderr, flush=True)
        task = Task(Path(job.folder), job.dataset, dict(enumerate(sources)), tokenizer, choice.name, threshold)
        units = _cut(job, sources, _settings(job, tokenizer, choice.name, threshold))
        try:
            _make_units(job, task, units, makers)
        except EncodersDisagree as error:
            choice = Choice(Reference.name, str(error))
            continue
        records = [read_record(task.root / unit.name) for unit in units]
        settled = _settle(threshold, records)
        if settled == threshold:
            return _screened(_manifest(job, task, units, records, choice), task, units, records, scan, makers)
        threshold = settled
    raise AssertionError("a threshold settles at once")


def _settings(job: TokenizeJob, tokenizer: TokenizerManifest, encoder: str, threshold: int) -> dict[str, Any]:
    """What a unit's shards depend on beside its sources."""
    dataset = job.dataset
    return {
        "version": _LAYOUT_VERSION,
        "kind": dataset.kind,
        "columns": columns_of(dataset),
        "format": dataset.format,
        "bad_rows": dataset.bad_rows,
        "max_document_mb": dataset.max_document_mb,
        "reasoning_in_loss": dataset.reasoning_in_loss,
        "threshold": threshold,
        "tokenizer": tokenizer.hash,
        "encoder": encoder,
    }


def _settle(threshold: int, records: list[dict[str, Any]]) -> int:
    """Keys below the result are validation: at least the lowest one, never the highest one.

    Documents that are all alike stay in training: they cannot be told apart.
    """
    lowest, highest = min(r["lowest_key"] for r in records), max(r["highest_key"] for r in records)
    if threshold == 0 or lowest == highest or highest < 0:
        return 0 if lowest == highest else threshold
    return min(max(threshold, lowest + 1), highest)


class _Makers(NamedTuple):
    """Who makes units: a pool, or this process; and what they count."""

    pool: ProcessPoolExecutor | None
    counters: Counters


@contextmanager
def _pool(job: TokenizeJob, tokenizer: Path, counters: Counters) -> Iterator[ProcessPoolExecutor | None]:
    """A pool whose processes load the encoders while this one hashes the sources and tries the fast encoder.

    None where there is too little to do for it.
    """
    size = sum(Path(file).stat().st_size for file in job.files if Path(file).exists())
    workers = min(job.workers, size // _BYTES_PER_WORKER)
    if workers < 2:
        yield None
        return
    with ProcessPoolExecutor(workers, _FORK, _start_worker, (tokenizer, counters)) as pool:
        pool.submit(os.getpid)  # starts all processes
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _make_units(job: TokenizeJob, task: Task, units: Sequence[Unit], makers: _Makers) -> None:
    waiting = [unit for unit in units if not (task.root / unit.name / RECORD).is_file()]
    progress = Progress(job.name, sum(unit.bytes for unit in waiting), makers.counters)
    if len(waiting) < len(units):
        print(f"tokenize {job.name}: {len(units) - len(waiting)} of {len(units)} units are there", file=sys.stderr)
    if makers.pool:
        # The largest first: no worker is left alone with one at the end.
        largest_first = sorted(waiting, key=lambda unit: -unit.bytes)
        _share_out(makers.pool, _make_in_worker, [(task.of(unit), unit) for unit in largest_first], progress.show)
    else:
        for unit in waiting:
            Worker(task.of(unit), makers.counters).make(unit)
    if progress.has_begun:
        progress.show()


def _screened(
    manifest: DataManifest,
    task: Task,
    units: Sequence[Unit],
    records: Sequence[dict[str, Any]],
    scan: Scan,
    makers: _Makers,
) -> DataManifest:
    """Without duplicates and evaluation texts, where the dataset asks for it."""
    if not scan.is_needed and task.dataset.deduplicate == "none":
        return manifest
    tasks = [(task.of(unit), unit, scan) for unit in units] if scan.is_needed else []
    if makers.pool:
        _share_out(
            makers.pool, scan_unit, tasks, lambda: print("looking for alike texts …", file=sys.stderr, flush=True)
        )
    else:
        for arguments in tasks:
            scan_unit(*arguments)
    screened, token_counts = screen(manifest, task, units, scan, _token_counts(records))
    return replace(screened, unigram_entropy_nats=unigram_entropy(token_counts))


def _share_out(
    pool: ProcessPoolExecutor, function: Callable[..., None], tasks: Sequence[tuple[Any, ...]], show: Callable[[], None]
) -> None:
    """Calls a function for each of the tasks' arguments, and shows progress meanwhile; the first exception ends it."""
    futures: set[Future[None]] = set()
    try:
        futures = {pool.submit(function, *arguments) for arguments in tasks}
        while futures:
            done, futures = wait(futures, Progress.every_s, FIRST_EXCEPTION)
            for future in done:
                future.result()
            if futures:
                show()
    except BrokenProcessPool:
        raise UserError(
            "a tokenizing process died, most often for lack of memory", "give the job more memory or fewer CPUs"
        ) from None
    finally:
        for future in futures:
            future.cancel()


_counters: list[Counters] = []  # of this process, filled once when a pool starts it


def _start_worker(tokenizer: Path, counters: Counters) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _counters.append(counters)
    with suppress(BaseException):  # a tokenizer at which its Rust half panics is left to the reference
        open_encoder(tokenizer, Fast.name)


def _end_with_parent() -> None:
    """A killed job leaves no worker behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_in_worker(task: Task, unit: Unit) -> None:
    Worker(task, _counters[0]).make(unit)


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy, in nats, of tokens drawn with these frequencies [vocabulary]: the loss of a model that only counts."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())


def _manifest(
    job: TokenizeJob, task: Task, units: Sequence[Unit], records: Sequence[dict[str, Any]], choice: Choice
) -> DataManifest:
    skipped = Counter[str]()
    for record in records:
        skipped.update(record["skipped"])
    documents = [0] * len(task.sources)
    for unit, record in zip(units, records, strict=True):
        for piece, count in zip(unit.pieces, record["documents"], strict=True):
            documents[piece.file] += count
    _require_documents(job, documents, records, skipped)
    settings = _settings(job, task.tokenizer, "", task.threshold)
    return DataManifest(
        dataset=job.name,
        kind=job.dataset.kind,
        path=job.folder,
        hash=content_hash([settings, [source.sha256 for source in task.sources.values()]]),
        tokenizer_hash=task.tokenizer.hash,
        dtype=token_dtype(task.tokenizer.vocab_size),
        splits={split: _split(split, units, records) for split in SPLITS},
        sources=[
            {"path": source.path, "bytes": source.bytes, "sha256": source.sha256, "documents": count}
            for source, count in zip(task.sources.values(), documents, strict=True)
        ],
        skipped=dict(sorted(skipped.items())),
        unigram_entropy_nats=unigram_entropy(_token_counts(records)),
        encoder=choice._asdict(),
    )


def _token_counts(records: Sequence[dict[str, Any]]) -> np.ndarray:
    total = np.zeros(len(records[0]["token_counts"]), dtype=np.int64)
    for record in records:
        total += record["token_counts"]
    return total


def _require_documents(
    job: TokenizeJob, documents: list[int], records: Sequence[dict[str, Any]], skipped: Counter[str]
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
