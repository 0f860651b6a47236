"""Who makes a job's units: a pool of processes or, where there is too little to do for it, this one."""

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

from longhaul.artifacts.shared_file_system import look_again
from longhaul.data.filters.fingerprints import Scan, scan_unit
from longhaul.data.shards.chunks import Source, Unit
from longhaul.data.shards.progress import Counters, Progress
from longhaul.data.shards.source_index import Corpus
from longhaul.data.shards.write_chunk import RECORD, Task, Worker
from longhaul.data.tokenizers.choose_encoder import Choice
from longhaul.data.tokenizers.document_encoder import EncodersDisagree
from longhaul.errors import UserError

_BYTES_PER_WORKER = 2_000_000  # less than this is encoded sooner than a worker starts
# Forked, workers share this process's imports and the loaded encoders, which take a second. Both encoders run in the
# thread that calls them, so there is none that a child would miss.
_FORK = multiprocessing.get_context("fork")

Chosen = Callable[[Sequence[Unit]], Sequence[Unit]]


def worker_count(source_bytes: int, most: int) -> int:
    """DistributedContext that are worth their start: 1, this one, up to `most`."""
    return max(1, min(most, source_bytes // _BYTES_PER_WORKER))


@contextmanager
def hashed(files: Sequence[str], file_format: str, workers: int) -> Iterator[Iterable[Source]]:
    """The files as sources, hashed by up to `workers` processes from now on; UserError as Source.of raises it."""
    with aside(min(workers, len(files)) if workers > 1 else 0) as each:
        yield each(Source.of, files, repeat(file_format))


@contextmanager
def aside(processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A map that so many processes begin with while this one does something else; of none, this one when it is asked."""
    with _pool(processes) if processes else nullcontext() as pool:
        yield pool.map if pool else map


class Makers:
    """Makes the units of one job, whose name is shown."""

    def __init__(self, name: str, pool: ProcessPoolExecutor | None, workers: int, counters: Counters) -> None:
        self._name, self._pool, self._counters = name, pool, counters
        self.parts = workers
        self.each: Callable[..., Iterable[Any]] = pool.map if pool else map

    @classmethod
    @contextmanager
    def start(cls, name: str, workers: int) -> Iterator[Makers]:
        """A pool's processes, which start with what this one has loaded, or this one alone."""
        counters = Counters(_FORK)
        with _pool(workers, counters) if workers > 1 else nullcontext() as pool:
            yield cls(name, pool, workers, counters)

    def make(self, corpus: Corpus, threshold: int, chosen: Chosen = list) -> tuple[Task, Sequence[Unit], Choice]:
        """Makes those of the corpus' units that are `chosen` and not there yet.

        With the reference when the fast encoder is found out meanwhile, here or by another job: no unit of the fast one
        counts then.
        """
        while True:
            choice = corpus.choice()
            if choice.reason:
                print(f"tokenize {self._name}: encoding with tokenizers: {choice.reason}", file=sys.stderr, flush=True)
            task = corpus.task(choice.name, threshold)
            units = chosen(corpus.units(choice.name, threshold))
            try:
                self._make(task, units)
            except EncodersDisagree as error:
                corpus.refute(str(error))
            if corpus.choice() == choice:
                return task, units, choice

    def _make(self, task: Task, units: Sequence[Unit]) -> None:
        look_again(task.root)  # lest those that other hosts made are made again
        waiting = [unit for unit in units if not (task.root / unit.name / RECORD).is_file()]
        progress = Progress(self._name, sum(unit.bytes for unit in waiting), self._counters)
        if len(waiting) < len(units):
            print(
                f"tokenize {self._name}: {len(units) - len(waiting)} of {len(units)} units are there", file=sys.stderr
            )
        if self._pool:
            # The largest first: no worker is left alone with one at the end.
            largest_first = sorted(waiting, key=lambda unit: -unit.bytes)
            _share_out(self._pool, _make_in_worker, [(task.of(unit), unit) for unit in largest_first], progress.show)
        else:
            for unit in waiting:
                Worker(task.of(unit), self._counters).make(unit)
        if progress.has_begun:
            progress.show()

    def scan(self, task: Task, units: Sequence[Unit], scan: Scan) -> None:
        """Looks up in the units' texts what the dataset asks for, if anything."""
        tasks = [(task.of(unit), unit, scan) for unit in units] if scan.is_needed else []
        if self._pool:
            _share_out(self._pool, scan_unit, tasks, _say_scanning)
        else:
            for arguments in tasks:
                scan_unit(*arguments)


def _say_scanning() -> None:
    print("looking for alike texts …", file=sys.stderr, flush=True)


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
    finally:
        for future in futures:
            future.cancel()


@contextmanager
def _pool(workers: int, *counters: Counters) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(workers, _FORK, _start_worker, counters) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise UserError(
                "a tokenizing process died, most often for lack of memory", "give the job more memory or fewer CPUs"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_counters: list[Counters] = []  # of this process, filled once when a pool starts it


def _start_worker(*counters: Counters) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _counters.extend(counters)


def _end_with_parent() -> None:
    """A killed job leaves no worker behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_in_worker(task: Task, unit: Unit) -> None:
    Worker(task, _counters[0]).make(unit)
