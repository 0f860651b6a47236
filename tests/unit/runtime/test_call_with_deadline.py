"""A call that never returns costs the process its deadline, and not its end."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from longhaul.runtime.call_with_deadline import call_within

_STUCK = """
import ctypes
from longhaul.runtime.call_with_deadline import call_within
try:
    call_within(0.1, lambda: ctypes.CDLL(None).sleep(600))  # in C, without Python's lock, as a call into NCCL
except TimeoutError as error:
    raise SystemExit(str(error))
"""


def test_result_and_error_of_the_call_are_passed_on():
    assert call_within(10, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        call_within(10, lambda: 1 // 0)


def test_time_out_of_the_call_itself_keeps_its_words():
    def fail() -> None:
        raise TimeoutError("the peer does not answer")

    with pytest.raises(TimeoutError, match=r"^the peer does not answer$"):
        call_within(10, fail)


def test_process_ends_beside_a_call_that_never_returns():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _STUCK], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, "no answer within 0.1 s")
    assert time.monotonic() - started < 250
