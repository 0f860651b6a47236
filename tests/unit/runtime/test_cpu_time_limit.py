"""Code that computes for too long ends."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time

import pytest

from longhaul.runtime.cpu_time_limit import CpuTimeExceeded, cpu_time_limit


def test_endless_code_ends():
    started = time.process_time()
    with pytest.raises(CpuTimeExceeded), cpu_time_limit(0.05):
        while True:
            pass
    assert time.process_time() - started < 2


def test_one_endless_operation_ends_its_process():
    """Python runs no signal handler inside of it."""
    child = multiprocessing.get_context("fork").Process(target=_compare_nested_lists)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGPROF


def _compare_nested_lists() -> None:
    one, other = [1], [1]
    for _ in range(60):
        one, other = [one, one], [other, other]
    with cpu_time_limit(0.05):
        assert one == other


def test_quick_code_leaves_no_timer_and_no_handler():
    before = signal.getsignal(signal.SIGVTALRM)
    with cpu_time_limit(5):
        pass
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    assert signal.getsignal(signal.SIGVTALRM) == before


def test_other_threads_have_no_limit():
    found: list[int] = []

    def work() -> None:
        with cpu_time_limit(0.001):
            found.append(sum(range(10**6)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [sum(range(10**6))]
