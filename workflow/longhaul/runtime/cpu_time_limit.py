"""Runs code that a user's file decides, such as a chat template, within the CPU time that the caller allows."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn


class CpuTimeExceeded(Exception):
    """The code did not end within its limit."""


@contextmanager
def cpu_time_limit(seconds: float) -> Iterator[None]:
    """Raise CpuTimeExceeded in the block when this process has computed so long in it.

    Signal handlers run between Python instructions of the main thread. Elsewhere, the block has no limit. One instruction may
    never end (the comparison of nested lists): after twice the time, SIGPROF, which nothing handles, ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> NoReturn:
        raise CpuTimeExceeded(f"no end within {seconds} s of CPU time")

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    signal.setitimer(signal.ITIMER_PROF, 2 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def ends_its_process(compute: Callable[[], object]) -> bool:
    """Return whether a cpu_time_limit in `compute` ends the process, which is a child of this one.

    That happens where one operation has no end.
    """
    child = multiprocessing.get_context("fork").Process(target=_ignore_exceptions, args=(compute,))
    child.start()
    child.join()
    return child.exitcode == -signal.SIGPROF


def _ignore_exceptions(compute: Callable[[], object]) -> None:
    with suppress(Exception):
        compute()
