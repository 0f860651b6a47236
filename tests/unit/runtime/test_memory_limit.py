"""The memory of code that a user's file decides has a limit."""

from __future__ import annotations

import resource
import threading

import pytest

from longhaul.runtime.memory_limit import MemoryExceeded, memory_limit


def test_only_what_exceeds_the_limit_is_refused():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with memory_limit(10**9):
        assert len(bytearray(10**8)) == 10**8
    with pytest.raises(MemoryExceeded, match=r"it needs more than 0\.5 GB of memory"), memory_limit(5 * 10**8):
        bytearray(10**11)  # freed memory, which the process still has, does not contain so much
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_smaller_limit_of_the_process_stays():
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**40, before[1]))
    try:
        with memory_limit(2**50):
            assert resource.getrlimit(resource.RLIMIT_AS)[0] == 2**40
        assert resource.getrlimit(resource.RLIMIT_AS)[0] == 2**40
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_another_thread_has_no_limit():
    found: list[int] = []

    def allocate() -> None:
        with memory_limit(1):
            found.append(len(bytearray(10**8)))

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    assert found == [10**8]
