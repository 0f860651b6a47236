"""Runs the jobs that tokenize one dataset: encodes missing chunks, applies filters, ensures a validation split, writes the
manifest.

The sources are divided into chunks (longhaul.data.shards.chunks), which a worker pool encodes. Chunks that exist are not
encoded again: a killed job continues, and a new file is encoded alone. The bytes do not depend on the number of workers
or on which job wrote which chunk.

If several jobs share a dataset's chunks, one job indexes its sources, and each encode job writes one data partition. The
last job writes the manifest; it finds all chunks, and encodes those that are missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from longhaul.artifacts.artifact_schemas import DataManifest, EncodedPartition, TokenizerManifest
from longhaul.artifacts.compare_hashes import read_tokenizer
from longhaul.data.filters.chunk_fingerprints import TextFilters
from longhaul.data.filters.filter_documents import filter_documents
from longhaul.data.sampling import mixture_manifest
from longhaul.data.shards.build_manifest import build_manifest, print_unread, require_complete_shards
from longhaul.data.shards.chunks import SourceFile, chunks_of_partition
from longhaul.data.shards.source_index import IndexedSources
from longhaul.data.shards.worker_pool import WorkerPool, background_map, hash_sources, worker_count
from longhaul.data.shards.write_chunk import ChunkRecord, read_chunk_record, remove_leftovers
from longhaul.data.tokenizers.choose_encoder import encode_stress_corpus, load_fast, load_reference
from longhaul.data.tokenizers.token_rows import TokenRows
from longhaul.errors import DISK_FULL_ERRNOS, DiskFull, InputError, UserError
from longhaul.jobs.kinds.tokenize_jobs import EncodeSpec, TokenizeSpec


def run(job: TokenizeSpec) -> None:
    """Encode the chunks that do not exist yet, then write the manifest `job.out`.

    Raises:
        UserError: the sources contain an error (longhaul.data.readers.read_documents), the dataset contains nothing to train
            on, or the shards cannot be written.
    """
    if job.dataset.mixture:
        mixture_manifest.run(job)
        return
    with _open_dataset(job, job.name) as (sources, filters, pool):
        manifest = _encode_dataset(sources, filters, pool)
        require_complete_shards(manifest, Path(job.folder))
        print_unread(manifest)
        manifest.write(Path(job.out))


def index_sources(job: TokenizeSpec) -> None:
    """Write the source index for the jobs that share the dataset's chunks to `job.out`. Raises UserError like `run`."""
    with _open_dataset(job, job.name) as (sources, _, _):
        sources.to_artifact().write(Path(job.out))


def encode(job: EncodeSpec) -> None:
    """Encode the chunks of the job's data partition, then write `job.out`. Raises UserError like `run`."""
    select = partial(chunks_of_partition, partition=job.partition, partitions=job.partitions)
    name = f"{job.name} {job.partition}/{job.partitions}"
    with _open_dataset(job, name, job.partitions) as (sources, filters, pool):
        task, chunks, choice = pool.encode(sources, sources.threshold, select)
        pool.fingerprint(task, chunks, filters)
        names = [chunk.name for chunk in chunks]
        EncodedPartition(job.partition, job.partitions, choice._asdict(), names).write(Path(job.out))


@contextmanager
def _open_dataset(
    job: TokenizeSpec, name: str, partitions: int = 1
) -> Iterator[tuple[IndexedSources, TextFilters, WorkerPool]]:
    """Yield the indexed sources, the filters and a worker pool.

    Everything that the workers use is loaded before the pool starts, because forked workers inherit this process's
    caches: the evaluation texts (TextFilters.load) and both encoders (_load_encoders).

    Raises:
        UserError: the input is incomplete, or the shards cannot be written.
    """
    tokenizer = read_tokenizer(Path(job.tokenizer))
    _require_input(job, tokenizer)
    filters = TextFilters.load(job.dataset, job.evaluation)
    source_bytes = sum(Path(file).stat().st_size for file in job.files if Path(file).exists())
    workers = worker_count(source_bytes // partitions, job.workers)
    files, stress_ids = _load_encoders(job, Path(tokenizer.path), workers)
    with WorkerPool.start(name, workers) as pool, _write_errors_as_user_errors(job):
        if job.source_index:
            sources = IndexedSources.load(job, tokenizer, Path(job.source_index))
        else:
            sources = IndexedSources.create(job, tokenizer, files, stress_ids, pool.worker_count, pool.map_parts)
        sources.root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(sources.root)
        yield sources, filters, pool


def _require_input(job: TokenizeSpec, tokenizer: TokenizerManifest) -> None:
    if job.dataset.kind == "chat" and not tokenizer.has_chat_template:
        raise InputError(f"dataset {job.name}: the tokenizer has no chat template", "set tokenizer.chat_template")
    if not job.files:
        raise UserError("the dataset has no files", "check its `files`, or run `longhaul fetch` first")


def _load_encoders(
    job: TokenizeSpec, tokenizer: Path, workers: int
) -> tuple[tuple[SourceFile, ...], tuple[TokenRows, ...]]:
    """Load both encoders into this process's caches, and use the time to prepare the source index.

    While this process loads, other processes hash the sources and encode the stress corpus with the reference.
    Return the hashed sources and the reference's ids; both are empty for a job that reads a source index.
    """
    needs_index = not job.source_index
    with hash_sources(job.files if needs_index else (), job.dataset.format, workers) as hashed:
        load_reference(tokenizer)
        with background_map(workers if workers > 1 and needs_index else 0) as map_parts:
            stress_ids = encode_stress_corpus(tokenizer, workers, map_parts) if needs_index else ()
            load_fast(tokenizer)
            return tuple(hashed), tuple(stress_ids)


@contextmanager
def _write_errors_as_user_errors(job: TokenizeSpec) -> Iterator[None]:
    """Convert an OSError to a UserError that names the folder of the shards."""
    try:
        yield
    except OSError as error:
        what, folder, remedy = f"writing dataset {job.name}", Path(job.folder), "choose another folder in storage.data"
        if error.errno in DISK_FULL_ERRNOS:
            existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
            raise DiskFull(what, folder, 0, shutil.disk_usage(existing).free, remedy) from None
        raise UserError(f"{what} to {folder}: {error}", f"let this user write there, or {remedy}") from None


def _encode_dataset(sources: IndexedSources, filters: TextFilters, pool: WorkerPool) -> DataManifest:
    """Encode all chunks and filter their documents; encode them again where one split would be empty."""
    threshold = sources.threshold
    for _ in range(2):
        task, chunks, choice = pool.encode(sources, threshold)
        records = [read_chunk_record(task.root / chunk.name) for chunk in chunks]
        adjusted = _adjust_threshold(threshold, records)
        if adjusted == threshold:
            pool.fingerprint(task, chunks, filters)
            manifest = build_manifest(sources, task, chunks, records, choice)
            return filter_documents(manifest, task, chunks, filters)
        threshold = adjusted
    raise AssertionError("the adjusted threshold needs no further adjustment")


def _adjust_threshold(threshold: int, records: Sequence[ChunkRecord]) -> int:
    """Return a threshold that puts at least the lowest key, but not the highest one, into the validation split.

    If all documents have the same key, no threshold separates them: they all stay in training.
    """
    lowest, highest = min(r["lowest_key"] for r in records), max(r["highest_key"] for r in records)
    if threshold == 0 or lowest == highest or highest < 0:
        return 0 if lowest == highest else threshold
    return min(max(threshold, lowest + 1), highest)
