"""Code that computes for too long ends."""

from __future__ import annotations

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


def test_quick_code_leaves_no_timer_and_no_handler():
    before = signal.getsignal(signal.SIGVTALRM)
    with cpu_time_limit(5):
        pass
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0) and signal.getsignal(signal.SIGVTALRM) == before


def test_other_threads_have_no_limit():
    found: list[int] = []

    def work() -> None:
        with cpu_time_limit(0.001):
            found.append(sum(range(10**6)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [sum(range(10**6))]
