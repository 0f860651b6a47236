"""Who makes a job's units: a pool of processes or, where there is too little to do for it, this one."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from longhaul.data.corpus import Corpus
from longhaul.data.encoders import Choice, Fast, open_encoder
from longhaul.data.encoding import EncodersDisagree
from longhaul.data.progress import Counters, Progress
from longhaul.data.scan import Scan, scan_unit
from longhaul.data.units import Unit
from longhaul.data.work import RECORD, Task, Worker
from longhaul.errors import UserError
from longhaul.shared_files import look_again

_BYTES_PER_WORKER = 2_000_000  # less than this is encoded sooner than a worker starts
# Forked, which spares every worker a third of a second of imports. It is done before a tokenizer is loaded, and workers
# encode with one thread, so there is no thread that a child would miss.
_FORK = multiprocessing.get_context("fork")

Chosen = Callable[[Sequence[Unit]], Sequence[Unit]]


class Makers:
    """Makes the units of one job, whose name is shown."""

    def __init__(self, name: str, pool: ProcessPoolExecutor | None, workers: int, counters: Counters) -> None:
        self._name, self._pool, self._counters = name, pool, counters
        self.parts: int = workers if pool else 1
        self.each: Callable[..., Iterable[Any]] = pool.map if pool else map

    @classmethod
    @contextmanager
    def start(cls, name: str, tokenizer: Path, source_bytes: int, workers: int) -> Iterator[Makers]:
        """A pool's processes load the encoders while this one hashes the sources and tries the fast encoder."""
        counters, workers = Counters(_FORK), min(workers, source_bytes // _BYTES_PER_WORKER)
        if workers < 2:
            yield cls(name, None, 1, counters)
            return
        import awkward  # noqa: F401 - gigatoken does it at its first batch; here it is paid for once, not in each process

        with ProcessPoolExecutor(workers, _FORK, _start_worker, (tokenizer, counters)) as pool:
            pool.submit(os.getpid)  # starts all processes
            try:
                yield cls(name, pool, workers, counters)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

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
