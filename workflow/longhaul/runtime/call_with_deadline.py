"""Calls a function in a thread of its own and waits for it only so long: a call into NCCL may never return.

On a broken link, NCCL blocks where it opens the connection, in C, where no signal and no exception of Python reaches it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def call_within(seconds: float, function: Callable[[], T]) -> T:
    """Return function(), or raise what it raises.

    Raises:
        TimeoutError: it does not return in time. Its thread is left behind, and does not keep the process from ending.
    """
    done: Future[T] = Future()
    Thread(target=_fill, args=(done, function), daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():
            raise
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def _fill(done: Future[Any], function: Callable[[], Any]) -> None:
    try:
        done.set_result(function())
    except BaseException as error:
        done.set_exception(error)
