"""Waiting for a condition, or for the end of processes, with a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import psutil


def wait_for(condition: Callable[[], object], timeout_s: float = 40.0) -> None:
    """Return when `condition` is true; fail after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.2)


def wait_for_end(processes: Iterable[psutil.Process], timeout_s: float = 40.0) -> None:
    """Return when none of the processes is alive; fail after `timeout_s` seconds. In a container, PID 1 may reap no orphan."""
    wait_for(lambda: not any(map(is_alive, processes)), timeout_s)


def is_alive(process: psutil.Process | int) -> bool:
    """Return whether a process, or the one with a pid, has not ended.

    An ended one stays as a zombie until its parent, or PID 1, reaps it.
    """
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
