"""Runs tokenizing in worker processes: how many there are, what each gets, and how they end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from itertools import repeat
from typing import Any

from longhaul.artifacts.shared_file_system import refresh_listing
from longhaul.data.filters.chunk_fingerprints import TextFilters, fingerprint_chunk
from longhaul.data.shards.chunks import Chunk, SourceFile
from longhaul.data.shards.progress_line import ProgressCounters, ProgressPrinter
from longhaul.data.shards.source_index import IndexedSources
from longhaul.data.shards.write_chunk import RECORD, ChunkWriter, EncodingTask
from longhaul.data.tokenizers.choose_encoder import EncoderChoice
from longhaul.data.tokenizers.document_encoder import EncodersDisagree
from longhaul.errors import UserError

_BYTES_PER_WORKER = 2_000_000  # encoding less than this takes less time than starting a worker
# Forked workers inherit this process's imports and loaded encoders, which take a second to load. Fork is safe here: both
# encoders run in the calling thread and start no threads, which a forked process would lack.
_FORK = multiprocessing.get_context("fork")

ChunkSelection = Callable[[Sequence[Chunk]], Sequence[Chunk]]


def worker_count(source_bytes: int, max_workers: int) -> int:
    """Return the number of processes to use, from 1 (this process alone) to `max_workers`."""
    return max(1, min(max_workers, source_bytes // _BYTES_PER_WORKER))


@contextmanager
def hash_sources(files: Sequence[str], file_format: str, workers: int) -> Iterator[Iterable[SourceFile]]:
    """Hash files in up to `workers` processes while the block runs; yield the results, in order.

    Reading a result raises UserError like SourceFile.from_file.
    """
    with background_map(min(workers, len(files)) if workers > 1 else 0) as map_parts:
        yield map_parts(SourceFile.from_file, files, repeat(file_format))


@contextmanager
def background_map(processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield a map that runs in `processes` other processes while this one continues.

    With 0 processes it is the built-in map, which runs in this process when its results are read.
    """
    with _process_pool(processes) if processes else nullcontext() as pool:
        yield pool.map if pool else map


class WorkerPool:
    """Encodes the chunks of one job and fingerprints their texts; `name` is the job's name in log lines.

    worker_count: number of processes.
    map_parts:    a map that runs in these processes.
    """

    def __init__(
        self, name: str, pool: ProcessPoolExecutor | None, worker_count: int, counters: ProgressCounters
    ) -> None:
        self._name, self._pool, self._counters = name, pool, counters
        self.worker_count = worker_count
        self.map_parts: Callable[..., Iterable[Any]] = pool.map if pool else map

    @classmethod
    @contextmanager
    def start(cls, name: str, workers: int) -> Iterator[WorkerPool]:
        """Start the processes, which inherit everything that this process has loaded."""
        counters = ProgressCounters(_FORK)
        with _process_pool(workers, counters) if workers > 1 else nullcontext() as pool:
            yield cls(name, pool, workers, counters)

    def encode(
        self, sources: IndexedSources, threshold: int, select: ChunkSelection = list
    ) -> tuple[EncodingTask, Sequence[Chunk], EncoderChoice]:
        """Write those chunks of the dataset that `select` returns and that do not exist yet.

        If this job or another one rejects the fast encoder meanwhile, the reference encodes all chunks: chunks of the
        fast encoder are then not used.
        """
        while True:
            choice = sources.current_choice()
            if choice.reason:
                print(f"tokenize {self._name}: encoding with tokenizers: {choice.reason}", file=sys.stderr, flush=True)
            task = sources.task(choice.name, threshold)
            chunks = select(sources.chunks(choice.name, threshold))
            try:
                self._write_missing(task, chunks)
            except EncodersDisagree as error:
                sources.reject_fast_encoder(str(error))
            if sources.current_choice() == choice:
                return task, chunks, choice

    def _write_missing(self, task: EncodingTask, chunks: Sequence[Chunk]) -> None:
        refresh_listing(task.root)  # so that chunks which other hosts wrote are not encoded again
        missing = [chunk for chunk in chunks if not (task.root / chunk.name / RECORD).is_file()]
        progress = ProgressPrinter(self._name, sum(chunk.size_bytes for chunk in missing), self._counters)
        if len(missing) < len(chunks):
            print(
                f"tokenize {self._name}: {len(chunks) - len(missing)} of {len(chunks)} chunks exist already",
                file=sys.stderr,
            )
        if self._pool:
            # The largest first, so that no worker is left alone with a large chunk at the end.
            largest_first = sorted(missing, key=lambda chunk: -chunk.size_bytes)
            tasks = [(task.for_chunk(chunk), chunk) for chunk in largest_first]
            _run_all(self._pool, _write_chunk_in_worker, tasks, progress.show)
        else:
            for chunk in missing:
                ChunkWriter(task.for_chunk(chunk), self._counters).write(chunk)
        if progress.has_documents:
            progress.show()

    def fingerprint(self, task: EncodingTask, chunks: Sequence[Chunk], filters: TextFilters) -> None:
        """Fingerprint the texts of chunks where the dataset's filters need it."""
        tasks = [(task.for_chunk(chunk), chunk, filters) for chunk in chunks] if filters.need_texts else []
        if self._pool:
            _run_all(self._pool, fingerprint_chunk, tasks, _print_fingerprinting)
        else:
            for arguments in tasks:
                fingerprint_chunk(*arguments)


def _print_fingerprinting() -> None:
    print("searching for similar texts and evaluation texts …", file=sys.stderr, flush=True)


def _run_all(
    pool: ProcessPoolExecutor, function: Callable[..., None], tasks: Sequence[tuple[Any, ...]], show: Callable[[], None]
) -> None:
    """Call a function in the pool with each task's arguments, and show progress; the first exception ends the work."""
    futures: set[Future[None]] = set()
    try:
        futures = {pool.submit(function, *arguments) for arguments in tasks}
        while futures:
            done, futures = wait(futures, ProgressPrinter.interval_s, FIRST_EXCEPTION)
            for future in done:
                future.result()
            if futures:
                show()
    finally:
        for future in futures:
            future.cancel()


@contextmanager
def _process_pool(workers: int, *counters: ProgressCounters) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(workers, _FORK, _initialize_worker, counters) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise UserError(
                "a tokenizing process was killed, most often for lack of memory, else by an endless chat template",
                "give the job more memory or fewer CPUs, or use another tokenizer.chat_template",
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker_counters: list[ProgressCounters] = []  # of this worker process; _initialize_worker fills it once


def _initialize_worker(*counters: ProgressCounters) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_counters.extend(counters)


def _exit_with_parent() -> None:
    """Exit when the parent process ends, so that a killed job leaves no worker behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_chunk_in_worker(task: EncodingTask, chunk: Chunk) -> None:
    ChunkWriter(task, _worker_counters[0]).write(chunk)
